"""Every command's arguments and overrides, damaged: unknown words, words twice, missing, of another kind."""

from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz import arguments, search
from tests.fuzz.surfaces import Bench

# nemo_run's shell, invoke, leaves the pipes of what it ran to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_whole(bench: Bench) -> None:
    """Each command line succeeds before it is damaged."""
    faults = [
        f"{line}: {found}" for line in arguments.LINES if (found := arguments.run(bench, line.split(), whole=True))
    ]
    assert not faults, "\n".join(faults)


def test_damaged_command_lines(bench: Bench) -> None:
    _search(bench, arguments.command_lines(), "arguments")


def test_overrides(bench: Bench) -> None:
    _search(bench, arguments.overrides(), "overrides")


def _search(bench: Bench, lines: st.SearchStrategy[Any], title: str) -> None:
    found = search.search(lines, lambda words: arguments.run(bench, words), title)
    assert not found, search.told(found)
