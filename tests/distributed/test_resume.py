"""A run that was interrupted goes on as if it had not been, at the same layout to the bit and at another to 1e-4."""

import dataclasses
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards, parts_of
from mixtral_recipes.errors import CheckpointError, RecipeError
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, Seen, checkpoints_of, metrics_of, silent, start
from tests.torch_dist import window

FIRST, THEN = 3, 3  # steps before and after the interruption

LAYOUTS = {"ep1": {}, "ep2": {"expert_model_parallel_size": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "full": {"lr": 1e-3},
    "lora": {"lora": True},
    "lora-packed": {"lora": True, "packed": True},
    "qlora-packed": {"bits": 4, "packed": True},
    "full-packed": {"packed": True, "lr": 1e-3},
}


def _job(folder: str, kind: str, layout: dict[str, Any], base: str | None, **more: Any) -> Job:
    fields = {"base": None if kind == "pretrain" else base, **KINDS[kind], **more}
    return Job(folder, layout=layout, **fields)


def interrupted_and_not(folder: str, cases: list[tuple[str, str, bool]], first: int, then: int) -> dict[str, Any]:
    """For each case a run in one go, and one in two starts; what this rank saw of them."""
    found = {}
    with silent():
        base = start(Job(folder, name="base", steps=1)).result["checkpoint"]
        for kind, layout, asynchronous in cases:
            name = f"{kind}-{layout}-{asynchronous}"
            whole = _job(folder, kind, LAYOUTS[layout], base, name=f"{name}-whole", steps=first + then)
            # Both know the whole length: the schedule and the data depend on it.
            early = dataclasses.replace(whole, name=f"{name}-parts", steps=first, asynchronous=asynchronous, every=2)
            found[name] = (
                start(whole),
                start(early),
                start(dataclasses.replace(early, steps=first + then)),
            )
    return found


def _check_bit_for_bit(ranks: list[dict[str, tuple[Seen, Seen, Seen]]]) -> None:
    for rank, found in enumerate(ranks):
        for name, (whole, early, late) in found.items():
            assert whole.losses == early.losses | late.losses, (name, rank)
            assert whole.samples == early.samples + late.samples, (name, rank)
            assert whole.state == late.state != early.state, (name, rank)
            assert whole.result["val_loss"] == late.result["val_loss"], (name, rank)


WORLD_1 = [("pretrain", "ep1", False), ("lora-packed", "ep1", True)]
WORLD_2 = [
    ("pretrain", "ep2", True),
    ("full", "ep1", False),
    ("lora", "ep2", False),
    ("qlora-packed", "ep2", True),
    ("full-packed", "ep2", True),
]


@pytest.mark.parametrize(("world", "cases"), [(1, WORLD_1), (2, WORLD_2)])
def test_same_layout_resumes_bit_for_bit(tmp_path: Path, world: int, cases: list[tuple[str, str, bool]]) -> None:
    _check_bit_for_bit(launch(world, interrupted_and_not, str(tmp_path), cases, FIRST, THEN))


WORLD_4 = [(kind, ("ep1", "ep2")[n % 2], n % 4 < 2) for n, kind in enumerate(KINDS)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", WORLD_4, ids=lambda case: case[0])
def test_same_layout_resumes_bit_for_bit_on_four(tmp_path: Path, case: tuple[str, str, bool]) -> None:
    _check_bit_for_bit(launch(4, interrupted_and_not, str(tmp_path), [case], FIRST, THEN, timeout=500))


OVERLAPPING = DistributedDataParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)


def stored_under_overlap(folder: str) -> list[list[tuple[str, dict[str, Any]]]]:
    """What the checkpoints of a plain run hold, and of one whose ranks gather weights when they next need them."""
    plain = Job(folder, "plain", steps=4, every=2)
    overlapping = dataclasses.replace(plain, name="overlapping", layout={"ddp": OVERLAPPING})
    with silent():
        start(plain)
        start(overlapping)
    return [[(path.name, _stored(path)) for path in checkpoints_of(job)] for job in (plain, overlapping)]


def _stored(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(checkpoint / "weights")
    entries = reader.read_metadata().state_dict_metadata.items()
    found = {key: torch.empty(e.size) for key, e in entries if isinstance(e, TensorStorageMetadata)}
    load(found, storage_reader=reader, no_dist=True)
    return found


def test_a_checkpoint_between_two_steps_has_what_every_rank_updated(tmp_path: Path) -> None:
    for plain, overlapping in launch(2, stored_under_overlap, str(tmp_path)):
        assert len(plain) == len(overlapping) == 2
        for (_, before), (name, after) in zip(plain, overlapping, strict=True):
            different = [key for key in before if not torch.equal(before[key], after[key])]
            assert different == [], name
            for key, weight in before.items():
                if not key.startswith("optimizer."):
                    assert torch.equal(weight, before[f"optimizer.state.param.{key}"]), key


RESHARDED = {
    "EP2 to TP2": (2, {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP2 to PP2": (2, {}, {"pipeline_model_parallel_size": 2}),
    "EP4 to EP2 x PP2": (
        4,
        {"expert_model_parallel_size": 4},
        {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    "TP2 to EP2 with ETP1": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "PP2 to VPP": (
        2,
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
}


def resharded(folder: str, cases: dict[str, tuple[dict[str, Any], dict[str, Any]]], lora: bool) -> dict[str, Any]:
    """For each case: the losses of a run at its first layout, and of one that changes to the second half way."""
    found = {}
    with silent():
        model = {"num_layers": 4}
        base = start(Job(folder, name="base", steps=1, model=model)).result["checkpoint"] if lora else None
        for name, (before, after) in cases.items():
            whole = Job(folder, f"{name} whole", steps=6, layout=before, model=model, base=base, lora=lora)
            early = dataclasses.replace(whole, name=f"{name} parts", steps=3)
            start(early)
            late = start(dataclasses.replace(early, steps=6, layout=after))
            found[name] = (start(whole).losses, late.losses)
    return found


def _check_curves(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name, (whole, late) in found.items():
            assert sorted(late) == [4, 5, 6], name
            for step, loss in late.items():
                assert loss == pytest.approx(whole[step], abs=1e-4), (name, step)


def _pairs(world: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {name: (before, after) for name, (size, before, after) in RESHARDED.items() if size == world}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_another_layout_goes_on_with_the_same_losses(tmp_path: Path, world: int) -> None:
    _check_curves(launch(world, resharded, str(tmp_path), _pairs(world), False))


@pytest.mark.slow
def test_adapters_go_on_at_another_layout(tmp_path: Path) -> None:
    cases = {"EP2 to TP2": _pairs(2)["EP2 to TP2"]}
    # Dropout draws other numbers at another layout: the curves are compared loosely.
    for found in launch(2, resharded, str(tmp_path), cases, True):
        whole, late = found["EP2 to TP2"]
        assert all(late[step] == pytest.approx(whole[step], abs=0.05) for step in late)


def run_and_rerun(job: Job, changes: list[dict[str, Any]]) -> list[Any]:
    """Run a job, then again with each change; the result or the error of each."""
    outcomes: list[Any] = []
    with silent():
        start(job)
        for change in changes:
            try:
                outcomes.append(start(dataclasses.replace(job, **change)).result)
            except (RecipeError, CheckpointError) as error:
                outcomes.append(error)
    return outcomes


def test_what_may_change_is_said_and_what_may_not_is_refused(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=2)
    changed = {"steps": 3, "lr": 5e-3}
    (outcomes,) = launch(1, run_and_rerun, job, [{"steps": 3, "model": {"hidden_size": 64}}, {}, changed])
    assert isinstance(outcomes[0], RecipeError)
    assert "model.config.hidden_size: 32 -> 64" in str(outcomes[0])
    assert outcomes[1]["steps"] == 2  # it has finished, with the settings it was trained with, not those refused
    assert outcomes[2]["steps"] == 3
    said = metrics_of(job, "start")[-1]["changed"]
    assert "optim.config.lr: 0.01 -> 0.005" in said
    assert "trainer.max_steps: 2 -> 3" in said


def adapters_and_another_base(folder: str) -> tuple[list[str], str]:
    """Train on one base, then go on with another under the same run: what a full run says, adapters' refusal."""
    with silent():
        bases = [start(Job(folder, f"base{n}", steps=n)).result["checkpoint"] for n in (1, 2)]
        full = Job(folder, "full", steps=1, base=bases[0])
        start(full)
        start(dataclasses.replace(full, steps=2, base=bases[1]))
        said = metrics_of(full, "start")[-1]["changed"]
        job = Job(folder, "adapters", steps=1, base=bases[0], lora=True)
        checkpoint = start(job).result["checkpoint"]
        facts = json.loads((Path(checkpoint) / "context" / "run.json").read_text())
        assert facts["kind"] == "adapter"
        link = record.read(Path(checkpoint)).parent("base")
        assert link is not None
        assert link.path == str(Path(bases[0]))
        assert link.record.identity == identity_of(Path(bases[0]))
        assert facts["peft"]["class"] == "LoRA"
        try:
            start(dataclasses.replace(job, steps=2, base=bases[1]))
        except RecipeError as error:
            return said, str(error)
    return said, ""


def test_another_base_is_said_and_adapters_refuse_it(tmp_path: Path) -> None:
    ((said, refusal),) = launch(1, adapters_and_another_base, str(tmp_path))
    assert any(change.startswith("starting weights: ") for change in said)
    assert "base.weights: " in refusal


def read_by_megatron(job: Job) -> bool:
    """Save with two ranks, read weights and optimizer with Megatron's own `dist_checkpointing`, compare."""
    from megatron.core import dist_checkpointing

    held: list[Shard] = []

    class Hold:
        def on_train_end(self, run: Any) -> None:
            shards = model_shards(run.model, adapters_only=False)
            shards += optimizer_shards(run.optimizer, run.model, adapters_only=False)
            held.extend(dataclasses.replace(shard, tensor=shard.tensor.clone()) for shard in shards)

    with silent():
        saved = start(job, Hold()).result["checkpoint"]
    whole = dist_checkpointing.load_plain_tensors(str(Path(saved) / "weights"))
    for shard in held:
        expected = whole[shard.key][window(shard.offsets, shard.sizes)]
        assert torch.equal(expected.flatten(), shard.tensor.flatten()), shard.key
    return len(held) > 20


@pytest.mark.skipif(
    "strides" in TensorProperties.__dataclass_fields__,
    reason="Megatron-Core 0.19 reads no checkpoints with torch 2.15, its own neither",
)
def test_megatron_reads_what_was_written(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=1, layout={"expert_model_parallel_size": 2})
    assert launch(2, read_by_megatron, job) == [True, True]


def starts_from(job: Job) -> tuple[float, float]:
    """The largest first moment and the step count that training starts with."""
    found: list[float] = []

    class Look:
        def on_train_start(self, run: Any) -> None:
            for part in parts_of(run.optimizer):
                for state in part.optimizer.state.values():
                    found.extend((float(state["exp_avg"].abs().max()), float(state["step"])))

    with silent():
        start(job, Look())
    return max(found[0::2]), max(found[1::2])


def test_the_optimizers_state_is_taken_when_asked(tmp_path: Path) -> None:
    base = Job(str(tmp_path), "base", steps=2)
    assert launch(1, starts_from, base) == [(0.0, 0.0)]
    full = Job(str(tmp_path), "full", steps=1, base=str(checkpoints_of(base)[0]))
    assert launch(1, starts_from, full) == [(0.0, 0.0)]
    both = dataclasses.replace(full, name="both", optimizer_too=True)
    ((moment, step),) = launch(1, starts_from, both)
    assert moment > 0
    assert step == 2
    ((_, resumed),) = launch(1, starts_from, dataclasses.replace(both, steps=2))
    assert resumed == 2 + 1


def test_time_intervals(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=3, ckpt={"train_time_interval": timedelta(0), "save_top_k": -1})
    launch(1, _started, job)
    assert len(checkpoints_of(job)) == 3


def what_follows(job: Job) -> list[str]:
    """The hooks called during a run's last step and behind it."""
    called: list[str] = []

    class Look:
        def on_step_start(self, run: Any, step: int) -> None:
            called.clear()

        def on_validation_end(self, run: Any, metrics: dict[str, Any]) -> None:
            called.append("on_validation_end")

        def on_train_end(self, run: Any) -> None:
            called.append("on_train_end")

    with silent():
        start(job, Look())
    return called


@pytest.mark.parametrize("due", [{"every": 2}, {"ckpt": {"train_time_interval": timedelta(0)}}], ids=["steps", "time"])
def test_the_last_step_is_validated_and_then_saved_where_that_is_due(tmp_path: Path, due: dict[str, Any]) -> None:
    ckpt = {"save_last": False, "save_top_k": -1, **due.get("ckpt", {})}
    job = Job(str(tmp_path), steps=4, trainer={"val_check_interval": 2}, **{**due, "ckpt": ckpt})
    assert launch(1, what_follows, job) == [["on_validation_end", "on_train_end"]]
    *_, saved = (json.loads((path / "context" / "run.json").read_text()) for path in checkpoints_of(job))
    validated = {entry["step"]: entry["val_loss"] for entry in metrics_of(job, "val")}
    assert sorted(validated) == [2, 4]
    assert (saved["step"], saved["metrics"]["val_loss"]) == (4, validated[4])


def two_in_one_folder(job: Job) -> str:
    """Start a run in a folder whose lock is held."""
    import fcntl

    folder = job.run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        if torch.distributed.get_rank() == 0:
            fcntl.flock(held, fcntl.LOCK_EX)
        torch.distributed.barrier()
        try:
            start(job)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_two_runs_never_write_one_folder(tmp_path: Path) -> None:
    for refusal in launch(2, two_in_one_folder, Job(str(tmp_path))):
        assert refusal.startswith("LaunchError: ")
        assert "is being written by another run" in refusal


def test_checkpoints_kept_and_latest(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=6, every=1, asynchronous=True, ckpt={"save_top_k": 1, "monitor": "loss"})
    (seen,) = launch(1, _started, job)
    kept = checkpoints_of(job)
    best = min(seen.losses, key=lambda step: seen.losses[step])
    steps = [int(path.name.split("-")[-2]) for path in kept]
    assert steps == sorted({best, 6})
    assert (job.run_dir / "checkpoints" / "latest").resolve() == kept[-1].resolve()
    assert not list((job.run_dir / "checkpoints").glob(".*.partial"))
    shutil.rmtree(tmp_path / "run")


def _started(job: Job) -> Seen:
    with silent():
        return start(job)


def _started_without_links(job: Job) -> Seen:
    def refused(self: Path, *_: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    with mock.patch.object(Path, "symlink_to", refused):
        return _started(job)


def test_a_disk_without_links(tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=2, every=1)
    assert launch(1, _started_without_links, job)[0].result["steps"] == 2
    assert len(checkpoints_of(job)) == 2
    assert not (job.run_dir / "checkpoints" / "latest").exists()
