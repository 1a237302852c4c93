"""Every file that is read from outside, damaged: an error in one line or success, in bounded time and memory.

`FUZZ_SECONDS=60` spends that long on each file, with other examples each time; without it the few are the same.
What is found is kept below `FUZZ_FOUND`, a file for each kind of fault, ready to be moved to `corpus/`.
"""

import pytest

from tests.fuzz import search
from tests.fuzz.surfaces import BY_TITLE, Bench

# nemo_run's shell, invoke, leaves the pipes of what it ran to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_whole(bench: Bench) -> None:
    """As long as nothing is damaged every command succeeds: what is damaged is looked at."""
    faults = [f"{title}: {faults}" for title, surface in BY_TITLE.items() if (faults := bench.whole(surface))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("title", BY_TITLE)
def test_damaged(bench: Bench, title: str) -> None:
    surface = BY_TITLE[title]
    found = search.search(bench.damages(surface), lambda content: bench.run(surface, content), title)
    assert not found, search.told(found)
