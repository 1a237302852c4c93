"""Signals are noted, not died of; after one Ctrl-C the next kills, but at a prompt."""

import os
import signal
import sys
import threading

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.training.guards.signals import name_of, watching
from mixtral_recipes.training.watch.callbacks import PreemptionCallback


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGUSR2"])
def test_noted_and_handlers_put_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with watching("SIGUSR2") as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == name
    assert signal.getsignal(number) is before


def interrupted_twice() -> int:
    """The exit code of a process that gets Ctrl-C twice: 1 if it went on with KeyboardInterrupt."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.close(2)  # as under a terminal that has gone
            with watching():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_interrupt_kills_at_once_but_not_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    assert interrupted_twice() == -signal.SIGINT
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert interrupted_twice() == 1


def test_other_threads_watch_nothing() -> None:
    seen = []

    def look() -> None:
        with watching() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [None]


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"SIGUSR9' is not a signal.*SIGUSR"):
        name_of("SIGUSR9")
    for sig in (999, "SIGKILL"):
        with pytest.raises(RecipeError, match="is not a signal to watch"):
            PreemptionCallback(sig=sig).check(Topology(1))
    PreemptionCallback().check(Topology(1))
    assert name_of(12) == name_of("SIGUSR2") == "SIGUSR2"
