"""Bars count what they are told, in their unit, on a terminal and nowhere else."""

import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mixtral_recipes.system.progress import progress_bar, terminal_bar

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        return ESCAPES.sub("", self.getvalue())


def stderr_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by each test: pytest sets its own standard error after the fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_is_drawn_where_there_is_no_terminal(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if shown else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("Importing", 10, shown=shown) as advance:
        advance(10)
    assert stream.getvalue() == ""


def test_bytes_from_many_threads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_is_a_terminal(monkeypatch)
    with progress_bar("Importing", 2_000_000) as advance, ThreadPoolExecutor(4) as pool:
        list(pool.map(advance, [1000] * 2000))
    assert re.search(r"Importing \S+ 2\.0/2\.0 MB .* 0:00:00\s*$", terminal.text())


def test_records_without_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_is_a_terminal(monkeypatch)
    with progress_bar("checking", None, unit="records") as advance:
        advance(3)
        advance(4)
    assert re.search(r"checking \S+ 7/\? 0:00:0\d\s*$", terminal.text())


def test_steps_have_facts_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_is_a_terminal(monkeypatch)
    bar = terminal_bar("steps", terminal, stays=True)
    assert bar is not None
    with bar:
        task = bar.add_task("training", total=8, facts="")
        bar.update(task, completed=8, facts="loss 1.25")
        bar.console.print("saved")
    text = terminal.text()
    assert re.search(r"training .* 8/8 +loss 1\.25 +ETA 0:00:00\s*$", text)
    assert "saved\n" in text
