"""A command that is run again by several processes is stopped as it would be in one."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mixtral_recipes.executors import again


@pytest.mark.parametrize("ranks", [0, 2])
def test_ctrl_c_before_the_ranks_are_ready_is_an_interrupt(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started = f"[subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) for _ in range({ranks})]"
    program = f"import subprocess, sys, time; ranks = {started}; "
    program += "[rank.wait() for rank in ranks] or time.sleep(60); sys.exit(1)"  # as torchrun does
    monkeypatch.setattr(again, "torchrun", lambda _: [sys.executable, "-c", program])
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        again.again(["serve"], 2, to_ranks=True)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_is_stopped_leaves_no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    program = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(again, "torchrun", lambda _: [sys.executable, "-c", program])
    monkeypatch.setattr(again, "of_rank", lambda line, rank: None)

    def stop() -> None:
        while not (started.is_file() and started.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped(number: int, frame: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGTERM, stopped)
    timer = threading.Thread(target=stop)
    timer.start()
    try:
        with pytest.raises(InterruptedError):
            again.again(["evaluate"], 2)
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert not Path("/proc", started.read_text()).exists()
