"""Damaged checkpoints: found before anything in them is read, the file named, the one before taken."""

import random
import shutil
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.folder import list_checkpoints
from mixtral_recipes.checkpoints.format import restricted_pickle
from mixtral_recipes.checkpoints.load import find_checkpoint
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.settings.resume import AutoResume
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, silent, start

SEEDS = 100


def two_checkpoints(job: Job) -> None:
    """A run with a checkpoint at step 1 and one at step 2."""
    with silent():
        start(job)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = Job(str(tmp_path_factory.mktemp("runs")), steps=2, every=1, layout={"expert_model_parallel_size": 2})
    launch(2, two_checkpoints, job)
    return job.run_dir / "checkpoints"


def corrupt(folder: Path, seed: int) -> Path:
    """Damage one file of a checkpoint; every kind of file and of damage has its turn."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[seed % len(files)]
    content = bytearray(path.read_bytes())
    before = bytes(content)
    kind = (seed // len(files)) % 4
    if kind == 3:
        path.unlink()
        return path
    while bytes(content) == before:
        at = draw.randrange(len(content))
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + 4096] = bytes(min(4096, len(content) - at))
        else:
            del content[at:]
    path.write_bytes(content)
    return path


def test_every_damage_is_found_before_loading(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(content: bytes) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(restricted_pickle, "metadata_from", never)
    older, newest = list_checkpoints(run)
    assert find_checkpoint(AutoResume(), run) == newest
    shutil.copytree(older, tmp_path / older.name)
    damaged = tmp_path / newest.name
    for seed in range(SEEDS):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(newest, damaged)
        path = corrupt(damaged, seed)
        said: list[str] = []
        assert find_checkpoint(AutoResume(), tmp_path, said.append) == tmp_path / older.name, (seed, path)
        assert len(said) == 1
        assert path.name in said[0], (seed, said)
        assert said[0].startswith(f"WARNING: skipping {newest.name}: ")


def test_when_all_are_damaged_the_run_does_not_start_anew(run: Path, tmp_path: Path) -> None:
    for seed, checkpoint in enumerate(list_checkpoints(run)):
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
        corrupt(tmp_path / checkpoint.name, seed)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoint\(s\) is intact"):
        find_checkpoint(AutoResume(), tmp_path, lambda text: None)
    assert find_checkpoint(AutoResume(resume_if_exists=False), tmp_path) is None


def falls_back(job: Job) -> dict[int, float]:
    """Start a run whose newest checkpoint is damaged."""
    with silent():
        return start(job).losses


def test_a_run_goes_on_from_the_one_before(run: Path, tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=3, layout={"expert_model_parallel_size": 2})
    shutil.copytree(run, job.run_dir / "checkpoints", symlinks=True)
    newest = list_checkpoints(job.run_dir / "checkpoints")[-1]
    corrupt(newest, 7)
    for losses in launch(2, falls_back, job):
        assert sorted(losses) == [2, 3]
    again = list_checkpoints(job.run_dir / "checkpoints")
    assert len(again) >= 2
    assert find_checkpoint(AutoResume(), job.run_dir / "checkpoints", pytest.fail) == again[-1]
