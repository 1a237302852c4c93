"""Whole runs through `api`, in this process and on whatever device there is, small enough for dozens of them.

Where a GPU is, they run on it, on Transformer Engine's layers if that is installed. Elsewhere the same calls run on the
CPU, if the tests are asked to be rehearsed (`tests/gpu/conftest.py`).
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes import api
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training.distributed import free_memory
from mixtral_recipes.training.precision import check_device

FP8: dict[str, dict[str, Any]] = {
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {"precision": "32"}, "bf16": {}, **FP8}

ON_CARD = torch.cuda.is_available()
# Every width is a multiple of 128, as FP8 by blocks wants it; a rehearsal on a CPU takes a quarter of each.
_SHARE = 1 if ON_CARD else 4
LENGTH = 256 // _SHARE
SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 256 // _SHARE, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 64 // _SHARE, "ffn_hidden_size": 256 // _SHARE, "num_moe_experts": 4, "vocab_size": 2000,
    "max_position_embeddings": LENGTH, "init_method_std": 0.02,
}  # fmt: skip


@dataclass
class Watched:
    """What a run gave.

    Attributes:
        losses: By step, of this start.
        grad_norms: Likewise.
        validations: Likewise.
        result: The run's result.json.
        run_dir: Its folder.
        looked: What ``look`` returned at the end.
    """

    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    run_dir: Path = Path()
    looked: Any = None

    @property
    def checkpoint(self) -> str:
        """The newest checkpoint's folder."""
        return self.result["checkpoint"]

    @property
    def numbers(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step."""
        return {step: (loss, self.grad_norms[step]) for step, loss in self.losses.items()}


class _Watcher:
    def __init__(self, seen: Watched, look: Any) -> None:
        self.seen, self.look = seen, look

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.seen.losses[metrics["step"]] = metrics["loss"]
        self.seen.grad_norms[metrics["step"]] = metrics["grad_norm"]

    def on_validation_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.seen.validations[metrics["step"]] = metrics["val_loss"]

    def on_train_end(self, run: Any) -> None:
        if self.look is not None:
            self.seen.looked = self.look(run)


def train(
    folder: Path,
    name: str = "run",
    *,
    steps: int = 4,
    precision: str = "bf16",
    base: str | None = None,
    peft: Any = None,
    packed: bool = False,
    config: dict[str, Any] | None = None,
    plugins: dict[str, Any] | None = None,
    validate_every: int = 0,
    save: bool = False,
    length: int = LENGTH,
    batch: int = 4,
    same_batch: bool = False,
    lr: float = 1e-3,
    look: Any = None,
) -> Watched:
    """Train on the embedded passages, or fine-tune a checkpoint on the embedded questions.

    A test is skipped whose precision this machine does not have.

    Args:
        folder: Of runs.
        name: The run's; the same one again goes on from its checkpoint.
        steps: Where it ends.
        precision: One of `PRECISIONS`.
        base: Checkpoint to fine-tune; None starts from random weights.
        peft: Adapters to train.
        packed: Whether several samples share a sequence.
        config: Fields of the model's configuration beside `SMALL`.
        plugins: Fields of trainer.plugins beside the precision's.
        validate_every: Steps between validations.
        save: Whether checkpoints are written.
        length: Tokens of a sequence.
        batch: Sequences per step, two a microbatch.
        same_batch: Whether each step sees the same random tokens, so that its loss has to fall.
        lr: Learning rate, constant but for a cosine that is long.
        look: Called with the run when it ends.
    """
    plugin = MegatronMixedPrecision(**PRECISIONS[precision] | (plugins or {}))
    try:
        check_device(plugin)
    except RecipeError as error:
        pytest.skip(str(error))
    seen = Watched()
    arguments: dict[str, Any] = {
        "model": MixtralModel(MixtralConfigTiny(**SMALL | (config or {}))),
        "data": _data(length, batch, questions=base is not None, packed=packed, same_batch=same_batch),
        "trainer": Trainer(
            accelerator="auto", devices=1, max_steps=steps, val_check_interval=validate_every, limit_val_batches=1,
            enable_checkpointing=save, plugins=plugin, strategy=MegatronStrategy(ckpt_async_save=False),
            callbacks=[_Watcher(seen, look)],
        ),
        "log": NeMoLogger(name=name, log_dir=str(folder), ckpt=ModelCheckpoint()),
        "optim": MegatronOptimizerModule(
            OptimizerConfig(lr=lr, use_distributed_optimizer=True),
            CosineAnnealingScheduler(warmup_steps=0, max_steps=1000, min_lr=lr / 10),
        ),
        "resume": AutoResume(RestoreConfig(base) if base else None),
        "tokenizer": "embedded://mixtral_tiny",
    }  # fmt: skip
    free_memory()  # a test that failed, or looked at a run, may have left it
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        seen.run_dir = api.train(**arguments, model_transform=peft)
    seen.result = json.loads((seen.run_dir / "result.json").read_text())
    return seen


def _data(length: int, batch: int, *, questions: bool, packed: bool, same_batch: bool) -> Any:
    sizes = {"seq_length": length, "micro_batch_size": 1 if packed else 2, "global_batch_size": batch}
    if same_batch:
        return MockDataModule(vocab_size=1900, num_train_samples=batch, num_val_samples=batch, **sizes)
    if questions:
        specs = PackedSequenceSpecs(packed_sequence_size=length) if packed else None
        return SquadDataModule(dataset_root="embedded://squad", packed_sequence_specs=specs, **sizes)
    return PreTrainingDataModule(paths="embedded://squad/pretraining.jsonl", split="90,10,0", **sizes)


def falls(losses: dict[int, float]) -> bool:
    """Whether the last two losses are finite and, in the mean, below the first."""
    values = list(losses.values())
    return all(math.isfinite(loss) for loss in values) and sum(values[-2:]) / 2 < values[0]
