"""Optimizer states in 16 bits: Megatron's distributed optimizer over Transformer Engine's FusedAdam, on the CPU.

Only the kernels are stood in for; what they are given, and what is kept between two steps, is the real thing's.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor

from mixtral_recipes import api
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.remainders import joined, split
from mixtral_recipes.checkpoints.shards import optimizer_shards, parts_of
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from tests.distributed.tiny_job import tiny_config

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


@pytest.fixture(autouse=True)
def fused_adam(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformer Engine's Adam on the CPU, where Megatron is otherwise given torch's."""
    import megatron.core.optimizer as megatron
    from transformer_engine.pytorch.optimizers import fused_adam as engine

    cpu_device.activate()
    monkeypatch.setattr(megatron, "Adam", engine.FusedAdam)
    monkeypatch.setattr(megatron, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(engine.tex, "multi_tensor_adam", whole_weights)
    monkeypatch.setattr(engine.tex, "multi_tensor_adam_param_remainder", halves_of_weights)
    yield
    monkeypatch.undo()
    cpu_device.deactivate()


class Watcher:
    """Losses by step; state and weights of the last step, and of the first before it was made."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.kept: dict[str, torch.dtype] = {}
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def on_train_start(self, run: Any) -> None:
        if run.optimizer.chained_optimizers[0].optimizer.state:  # as a checkpoint was read
            self.first = state_of(run)

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.losses[metrics["step"]] = metrics["loss"]

    def on_train_end(self, run: Any) -> None:
        self.last = state_of(run)
        (part, *_) = parts_of(run.optimizer)
        self.kept = {name: value.dtype for name, value in next(iter(part.optimizer.state.values())).items()}


def state_of(run: Any) -> dict[str, Tensor]:
    """What a checkpoint would hold, by name and place."""
    shards = optimizer_shards(run.optimizer, run.model, adapters_only=False)
    for stand_in in {shard.stand_in for shard in shards if shard.stand_in is not None}:
        stand_in.take()
    found = {f"{shard.key} {shard.offsets}": shard.tensor.clone() for shard in shards}
    return found | {name: p.detach().clone() for name, p in run.model[0].named_parameters()}


def train(folder: Path, name: str, steps: int, states: str, *, overlap: bool = False) -> tuple[Watcher, Path]:
    """A short run, or the rest of one; what it gave, and its last checkpoint."""
    watcher = Watcher()
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run_dir = api.pretrain(
            model=MixtralModel(tiny_config()),
            data=MockDataModule(
                vocab_size=2000, seq_length=32, micro_batch_size=1, global_batch_size=4, num_train_samples=60,
                num_val_samples=8,
            ),
            trainer=Trainer(
                accelerator="cpu", max_steps=steps, val_check_interval=2, limit_val_batches=1, callbacks=[watcher],
                plugins=MegatronMixedPrecision(precision="bf16-mixed"), strategy=MegatronStrategy(ddp=ddp), seed=1,
            ),
            log=NeMoLogger(name=name, log_dir=str(folder), ckpt=ModelCheckpoint(every_n_train_steps=2)),
            optim=MegatronOptimizerModule(
                OptimizerConfig(lr=1e-2, bf16=True, use_distributed_optimizer=True, **STATES[states])
            ),
            tokenizer="embedded://mixtral_tiny",
        )  # fmt: skip
    return watcher, Path(json.loads((run_dir / "result.json").read_text())["checkpoint"])


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ("halves", {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": torch.int16}),
        ("whole", {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": torch.float32}),
        ("moments", {"exp_avg": BF16, "exp_avg_sq": BF16, "master_param": torch.int16}),
        ("gradients", {"exp_avg": BF16, "exp_avg_sq": BF16, "master_param": torch.int16}),
    ],
)
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, states: str, kept: dict[str, torch.dtype]) -> None:
    whole, _ = train(tmp_path, "whole", 4, states)
    _, checkpoint = train(tmp_path, "parts", 2, states)
    late, _ = train(tmp_path, "parts", 4, states)
    assert whole.kept == kept
    assert late.losses == {step: whole.losses[step] for step in (3, 4)}
    assert late.last.keys() == whole.last.keys()
    for name, tensor in whole.last.items():
        assert torch.equal(late.last[name], tensor), name
    stored = StoredWeights(checkpoint / "weights")
    key = "optimizer.state.{}.embedding.word_embeddings.weight"
    assert stored.dtype(key.format("param")) is torch.float32
    assert stored.dtype(key.format("exp_avg")) is kept["exp_avg"]


@pytest.mark.parametrize(("before", "after"), [("plain", "moments"), ("moments", "plain"), ("halves", "whole")])
def test_states_change_their_format_at_a_resume(tmp_path: Path, before: str, after: str) -> None:
    written, _ = train(tmp_path, "run", 2, before)
    read, _ = train(tmp_path, "run", 3, after)
    assert read.first.keys() == written.last.keys()
    for name, tensor in written.last.items():
        if name.startswith("optimizer.state.param"):
            assert torch.equal(read.first[name], tensor), name
        else:  # moments are rounded to bf16
            torch.testing.assert_close(read.first[name].float(), tensor.float(), rtol=2**-7, atol=0, msg=name)


def test_weights_in_halves_are_trained_as_whole_ones(tmp_path: Path) -> None:
    plain, halves = (train(tmp_path, states, 4, states)[0] for states in ("plain", "halves"))
    assert plain.losses == pytest.approx(halves.losses, rel=1e-3)
    bf16, _ = train(tmp_path, "gradients", 4, "gradients")
    assert plain.losses == pytest.approx(bf16.losses, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype=float16 is not offered; use float32 or bfloat16"),
        ({"main_params_dtype": torch.float16}, "main_params_dtype=float16 is not offered; use float32"),
    ],
)
def test_what_could_not_be_saved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setitem(STATES, "refused", {"use_precision_aware_optimizer": True, **changes})
    with pytest.raises(RecipeError, match=words):
        train(tmp_path, "refused", 1, "refused")
