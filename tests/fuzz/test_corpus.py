"""Whatever was found once, again: a file for each kind of fault that a search met."""

from pathlib import Path

import pytest

from tests.fuzz import arguments, search
from tests.fuzz.surfaces import BY_TITLE, Bench

CORPUS = sorted(Path(__file__).parent.glob("corpus/*.json"))

# nemo_run's shell, invoke, leaves the pipes of what it ran to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_found_before(bench: Bench, path: Path) -> None:
    title, example = search.unpacked(path.read_text())
    faults = bench.run(BY_TITLE[title], example) if title in BY_TITLE else arguments.run(bench, example)
    assert not faults
