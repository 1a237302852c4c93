"""The list of faults that `scripts/plant_faults.py` plants: each one still applies, and names tests that exist."""

from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script

ROOT = Path(__file__).parents[3]


plant_faults = script("plant_faults")
FAULTS = plant_faults.read_faults()


def test_there_are_enough() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert len(names) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_still_applies(fault: Any) -> None:
    source = (ROOT / fault.file).read_text()
    planted = fault.planted(source)
    assert planted != source
    compile(planted, fault.file, "exec")  # a fault that does not even parse would be "caught" by anything
    assert fault.tests
    for test in fault.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test


@pytest.mark.parametrize("text", ["this stands nowhere in that file", "import "])
def test_one_that_no_longer_applies_is_no_pass(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(plant_faults, "run_tests", lambda *_: pytest.fail("nothing was planted"))
    outcome = plant_faults.try_fault(plant_faults.Fault("x", "x", "scripts/plant_faults.py", text, "y", ("tests",)))
    assert outcome.verdict == "broken"
    assert "times, not once" in outcome.detail


@pytest.mark.parametrize(
    ("code", "verdict"), [(0, "survived"), (1, "caught"), (2, "broken"), (4, "broken"), (5, "broken"), (-1, "broken")]
)
def test_only_a_failed_test_catches_a_fault(monkeypatch: pytest.MonkeyPatch, code: int, verdict: str) -> None:
    planted = []

    def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
        planted.append((tree / FAULTS[0].file).read_text())
        return code, "FAILED tests/x.py::test_y - AssertionError\n1 failed"

    monkeypatch.setattr(plant_faults, "run_tests", run_tests)
    assert plant_faults.try_fault(FAULTS[0]).verdict == verdict
    assert FAULTS[0].replacement in planted[0]
