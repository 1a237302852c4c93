"""Requests to stop: the signal is noted, and the loop saves and leaves when the step is done."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.system.machine import at_a_prompt

ALWAYS = ("SIGTERM", "SIGUSR1", "SIGINT")
CTRL_C = "\nCtrl-C: saving after this step; press it again to quit without saving.\n"


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


def name_of(sig: str | int) -> str:
    """The name of a signal that can be watched, given by name or number.

    Raises:
        RecipeError: no such signal.
    """
    known = {each.name: each.value for each in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}}
    for name, number in known.items():
        if sig in (name, number):
            return name
    raise RecipeError(f"PreemptionCallback.sig={sig!r} is not a signal to watch.{nearest(str(sig), list(known))}")


@contextlib.contextmanager
def watching(*more: str) -> Iterator[StopRequest]:
    """Record the signals of `stops_handled_by` instead of dying of them, until the block ends."""
    request = StopRequest()
    with stops_handled_by(request.note, *more):
        yield request


@contextlib.contextmanager
def stops_handled_by(handler: Callable[[int, FrameType | None], None], *more: str) -> Iterator[None]:
    """Call a handler for SIGTERM, SIGUSR1, Ctrl-C, a lost terminal and the named signals until the block ends.

    Outside the main thread, where Python delivers no signals, it is called for none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = {getattr(signal, name) for name in (*ALWAYS, *more)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.add(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
