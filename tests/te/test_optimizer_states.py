"""Optimizer states in 16 bits: Megatron's distributed optimizer over Transformer Engine's FusedAdam, on the CPU.

Only the kernels are stood in for; what they are given, and what is kept between two steps, is the real thing's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.remainders import joined, split
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards, parts_of
from mixtral_recipes.errors import RecipeError
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, silent, start
from tests.torch_dist import window

BF16 = torch.bfloat16
MOMENTS = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}
STATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "halves": {"use_precision_aware_optimizer": True},
    "whole": {"use_precision_aware_optimizer": True, "store_param_remainders": False},
    "moments": {"use_precision_aware_optimizer": True, **MOMENTS},
    "gradients": {"use_precision_aware_optimizer": True, "main_grads_dtype": BF16, **MOMENTS},
}


def adam(
    weights: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, b1: float, b2: float, eps: float, step: int, wd: float
) -> None:
    """AdamW in fp32, in place."""
    g = g.float()
    first, second = b1 * m.float() + (1 - b1) * g, b2 * v.float() + (1 - b2) * g * g
    m.copy_(first)
    v.copy_(second)
    update = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps) + wd * weights
    weights.sub_(lr * update)


def whole_weights(
    _chunk: int, _noop: Any, lists: Any, lr: Any, b1: Any, b2: Any, eps: Any, step: Any, mode: Any, bias: Any, wd: Any
) -> None:
    assert (mode, bias) == (1, 1)
    for g, p, m, v, *main in zip(*lists, strict=True):
        adam(main[0] if main else p, g, m, v, lr, b1, b2, eps, step, wd)
        if main:
            p.copy_(main[0])


def halves_of_weights(
    _chunk: int, _noop: Any, lists: Any, lr: Any, b1: Any, b2: Any, eps: Any, step: Any, mode: Any, bias: Any, wd: Any
) -> None:
    for g, p, m, v, remainder in zip(*lists, strict=True):
        weights = joined(p, remainder)
        adam(weights, g, m, v, lr, b1, b2, eps, step, wd)
        for into, half in zip((p, remainder), split(weights), strict=True):
            into.copy_(half)


def stand_in_for_the_kernels() -> None:
    """For the rest of this process, Transformer Engine's Adam on the CPU, where Megatron is otherwise given torch's."""
    import megatron.core.optimizer as megatron
    from transformer_engine.pytorch.optimizers import fused_adam as engine

    megatron.Adam = engine.FusedAdam
    megatron.USING_PYTORCH_OPTIMIZER = False
    engine.tex.multi_tensor_adam = whole_weights
    engine.tex.multi_tensor_adam_param_remainder = halves_of_weights


class Watcher:
    """State and weights after the last step, and before the first if a checkpoint was read; dtypes of a state."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.dtype] = {}
        self.first: list[Shard] = []
        self.last: list[Shard] = []

    def on_train_start(self, run: Any) -> None:
        if run.optimizer.chained_optimizers[0].optimizer.state:
            self.first = state_of(run)

    def on_train_end(self, run: Any) -> None:
        self.last = state_of(run)
        (part, *_) = parts_of(run.optimizer)
        self.kept = {name: value.dtype for name, value in next(iter(part.optimizer.state.values())).items()}


def state_of(run: Any) -> list[Shard]:
    """This rank's part of what a checkpoint would hold, copied."""
    shards = model_shards(run.model, adapters_only=False)
    shards += optimizer_shards(run.optimizer, run.model, adapters_only=False)
    for stand_in in {shard.stand_in for shard in shards if shard.stand_in is not None}:
        stand_in.take()
    return [dataclasses.replace(shard, tensor=shard.tensor.clone(), stand_in=None) for shard in shards]


@dataclasses.dataclass
class Outcome:
    """What one rank saw of a start."""

    losses: dict[int, float]
    checkpoint: Path
    seen: Watcher


def train(folder: str, name: str, steps: int, states: str, **layout: Any) -> Outcome:
    """A short run, or the rest of one."""
    job = Job(
        folder, name, steps, layout, every=2, optimizer={"bf16": True, **STATES[states]}, precision="bf16-mixed",
        trainer={"val_check_interval": 2},
    )  # fmt: skip
    watcher = Watcher()
    with silent():
        seen = start(job, watcher)
    return Outcome(seen.losses, Path(seen.result["checkpoint"]), watcher)


def starts(folder: str, *each: tuple[str, int, str, dict[str, Any]]) -> list[Outcome]:
    """One start after the other, of a name, to a step, with such states, in a layout."""
    stand_in_for_the_kernels()
    return [train(folder, name, steps, states, **layout) for name, steps, states, layout in each]


EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
KEPT: dict[str, dict[str, torch.dtype]] = {
    "halves": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": torch.int16},
    "whole": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": torch.float32},
    "moments": {"exp_avg": BF16, "exp_avg_sq": BF16, "master_param": torch.int16},
    "gradients": {"exp_avg": BF16, "exp_avg_sq": BF16, "master_param": torch.int16},
}


@pytest.mark.parametrize(
    ("states", "world", "layout"),
    [
        ("halves", 1, {}), ("whole", 1, {}), ("moments", 1, {}), ("gradients", 1, {}),
        ("halves", 2, EP2), ("moments", 2, {}), ("gradients", 2, TP2),
    ],
)  # fmt: skip
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, states: str, world: int, layout: dict[str, Any]) -> None:
    each = [("whole", 4, states, layout), ("parts", 2, states, layout), ("parts", 4, states, layout)]
    for whole, early, late in launch(world, starts, str(tmp_path), *each):
        assert whole.seen.kept == KEPT[states]
        assert late.losses == {step: whole.losses[step] for step in (3, 4)}
        for found, expected in zip(late.seen.last, whole.seen.last, strict=True):
            assert found.place == expected.place
            assert torch.equal(found.tensor, expected.tensor), found.key
        stored = StoredWeights(early.checkpoint / "weights")
        key = "optimizer.state.{}.embedding.word_embeddings.weight"
        assert stored.dtype(key.format("param")) is torch.float32
        assert stored.dtype(key.format("exp_avg")) is KEPT[states]["exp_avg"]


@pytest.mark.parametrize(
    ("before", "after", "layouts"),
    [
        ("plain", "moments", ({}, {})),
        ("moments", "plain", ({}, {})),
        ("halves", "whole", ({}, {})),
        ("halves", "halves", (EP2, TP2)),
        ("moments", "moments", (TP2, {})),
    ],
)
def test_what_was_written_is_read(
    tmp_path: Path, before: str, after: str, layouts: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Into states of another format, and in another layout."""
    each = [("run", 2, before, layouts[0]), ("run", 3, after, layouts[1])]
    ranks = launch(2 if any(layouts) else 1, starts, str(tmp_path), *each)
    whole: dict[str, Tensor] = {}
    for written, _ in ranks:
        for shard in written.seen.last:
            place = whole.setdefault(shard.key, torch.full(shard.whole, torch.nan))
            place[window(shard.offsets, shard.sizes)] = shard.tensor.view(shard.sizes).float()
    in_halves = KEPT.get(after, {}).get("master_param") is torch.int16
    for _, read in ranks:
        assert {shard.key for shard in read.seen.first} <= whole.keys()
        assert any("exp_avg" in shard.key for shard in read.seen.first)
        for shard in read.seen.first:
            rounded = before != after and shard.key.startswith("optimizer.state.exp")  # to bf16, or from it
            found = shard.tensor.view(shard.sizes).float()
            expected = whole[shard.key][window(shard.offsets, shard.sizes)]
            if in_halves and (main := whole.get(f"optimizer.state.param.{shard.key}")) is not None:
                # Halfway between two bf16 numbers Transformer Engine rounds away from zero, a cast to the even one.
                expected = split(main[window(shard.offsets, shard.sizes)])[0].float()
            torch.testing.assert_close(found, expected, rtol=2**-7 if rounded else 0, atol=0, msg=shard.key)


def test_weights_in_halves_are_trained_as_whole_ones(tmp_path: Path) -> None:
    each = [(states, 4, states, {}) for states in ("plain", "halves", "gradients")]
    ((plain, halves, gradients),) = launch(1, starts, str(tmp_path), *each)
    assert plain.losses == pytest.approx(halves.losses, rel=1e-3)
    assert plain.losses == pytest.approx(gradients.losses, rel=1e-2)


def refusal(folder: str, states: dict[str, Any]) -> str:
    """What is said of states that are not supported."""
    stand_in_for_the_kernels()
    STATES["refused"] = {"use_precision_aware_optimizer": True, **states}
    try:
        train(folder, "refused", 1, "refused")
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype=float16 is not supported; use float32 or bfloat16"),
        ({"main_params_dtype": torch.float16}, "main_params_dtype=float16 is not supported; use float32"),
    ],
)
def test_what_could_not_be_saved_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (said,) = launch(1, refusal, str(tmp_path), changes)
    assert words in said
