"""Being asked to stop: the signal is noted, and the loop saves and leaves at the next step's end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether any rank has been asked to stop."""

    def __init__(self) -> None:
        self.received: str | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


@contextmanager
def watching(*names: str) -> Iterator[StopRequest]:
    """Note these signals instead of dying of them, until the block ends."""
    request = StopRequest()
    before = {name: signal.signal(getattr(signal, name), request._note) for name in names}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
