"""The watchdog ends a process that shows no sign of life, and leaves one alone that does."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from mixtral_recipes.training.guards import watchdog
from mixtral_recipes.training.guards.watchdog import Watchdog


def _in_a_child(work: Callable[[], None]) -> int:
    """Run something in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_hang_leaves_the_stacks_tells_the_launcher_and_ends(tmp_path: Path) -> None:
    def hang() -> None:
        watchdog.before_exit.append(lambda error: (tmp_path / "told").write_text(str(error)) and None)
        with Watchdog(0.3, tmp_path / "stacks", rank=7).watching() as watched:
            watched.alive("step 12")
            time.sleep(60)

    assert _in_a_child(hang) == 2
    text = (tmp_path / "stacks" / "rank-7.txt").read_text()
    assert "no progress for" in text
    assert "in step 12" in text
    assert "in hang" in text, "the stack of the thread that hangs"
    told = (tmp_path / "told").read_text()
    assert told.startswith("rank 7: no progress")
    assert "trainer.hang_timeout_seconds=0.3" in told


def test_signs_of_life_keep_it_quiet(tmp_path: Path) -> None:
    def live() -> None:
        with Watchdog(1.5, tmp_path / "stacks", rank=0).watching() as watched:
            for step in range(20):
                watched.alive(f"step {step}")
                time.sleep(0.1)

    assert _in_a_child(live) == 0
    assert not (tmp_path / "stacks").exists()


def test_an_orphan_ends_under_a_launcher(tmp_path: Path) -> None:
    def middle() -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
        pid = os.fork()
        if pid == 0:
            with Watchdog(60.0, tmp_path, rank=0).watching():
                time.sleep(30)
            os._exit(0)
        time.sleep(0.5)

    started = time.monotonic()
    assert _in_a_child(middle) == 0
    while not (tmp_path / "rank-0.txt").exists() and time.monotonic() - started < 20:
        time.sleep(0.1)
    assert "the process that started this rank is gone" in (tmp_path / "rank-0.txt").read_text()
