"""Requests to stop: the signal is noted, and the loop saves and leaves when the step is done."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.system.machine import at_a_prompt

ALWAYS = ("SIGTERM", "SIGUSR1", "SIGINT")
CTRL_C = "\nCtrl-C: saving when this step is done; once more quits without saving.\n"


class StopRequest:
    """Whether this rank has been asked to stop.

    Attributes:
        received: The signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Take note of a signal.

        After Ctrl-C, the next one kills at once, whatever the process is doing; in a notebook or at a prompt, which are
        to live on, it raises KeyboardInterrupt.
        """
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler if at_a_prompt() else signal.SIG_DFL)
            with contextlib.suppress(OSError):  # not print(): the signal may have interrupted one
                os.write(2, CTRL_C.encode())


@contextlib.contextmanager
def watching(*more: str) -> Iterator[StopRequest]:
    """Note SIGTERM, SIGUSR1, Ctrl-C, a lost terminal and the signals named, not dying of them, until the block ends.

    Outside the main thread, where Python delivers no signals, nothing is watched.

    Raises:
        RecipeError: no such signal.
    """
    request = StopRequest()
    known = [found.name for found in signal.Signals]
    for name in more:
        if name not in known:
            raise RecipeError(f"PreemptionCallback.sig={name!r} is not a signal.{nearest(name, known)}")
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = {getattr(signal, name) for name in (*ALWAYS, *more)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.add(signal.SIGHUP)
    before = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
