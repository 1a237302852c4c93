"""Which checkpoints stay."""

import os
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.retention import Kept, remove_unused, surplus, to_make_room
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system import locks

INFINITE = float("inf")


def _kept(*scores: float, nbytes: int = 10) -> list[Kept]:
    return [Kept(Path(f"step-{step}"), step, score, nbytes) for step, score in enumerate(scores, start=1)]


def _steps(found: list[Kept]) -> list[int]:
    return [kept.step for kept in found]


def test_the_newest_and_the_best_stay() -> None:
    found = _kept(3.0, 1.0, 2.0, 4.0, 5.0)
    assert _steps(surplus(found, 2)) == [4, 1]
    assert _steps(surplus(found, 0)) == [4, 1, 3, 2]
    assert surplus(found, -1) == []
    assert surplus(found[:1], 0) == []


def test_among_equals_the_newer_stays() -> None:
    assert _steps(surplus(_kept(INFINITE, INFINITE, INFINITE), 1)) == [1, 2]
    assert _steps(surplus(_kept(INFINITE, 2.0, INFINITE, INFINITE), 2)) == [1, 3]


def test_what_is_no_number_is_never_best() -> None:
    assert _steps(surplus(_kept(2.0, float("nan"), 1.0, INFINITE, 5.0), 2)) == [2, 4]


def test_room_is_made_from_the_worst_and_never_from_the_newest() -> None:
    found = _kept(3.0, 1.0, 9.0)
    assert to_make_room(found, 10, 40) == []
    assert _steps(to_make_room(found, 10, 30)) == [1]
    assert _steps(to_make_room(found, 10, 20)) == [1, 2]
    with pytest.raises(EnvironmentProblem, match=r"max_disk_gb=1\.9e-08 is too small"):
        to_make_room(found, 10, 19)


def test_what_a_command_reads_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_in_use", reading := {})
    found = [Kept(tmp_path / name, 1, 1.0) for name in ("read", "unread", "damaged")]
    for kept in found[:2]:
        kept.path.mkdir()
        (kept.path / "manifest.json").touch()
    found[2].path.mkdir()
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):  # as a script that asks a run again and again
        locks.use(found[0].path / "manifest.json")
    assert len(os.listdir("/proc/self/fd")) == open_files + 1
    remove_unused(found)
    assert [path.name for path in tmp_path.iterdir()] == ["read"]
    os.close(*reading.values())  # as the end of the command does
    remove_unused(found[:1])
    assert list(tmp_path.iterdir()) == []
