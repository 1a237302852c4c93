"""A whole run through `api`, small enough to be repeated: what the tests of resuming, stopping and damage start."""

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor

from mixtral_recipes import api
from mixtral_recipes.checkpoints import checkpointer as checkpoint
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards
from mixtral_recipes.checkpoints.state import random_state
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA, QLoRA
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import distributed

_write_report = api.write_report_of


@dataclass(frozen=True)
class Job:
    """One start of a run.

    Attributes:
        folder: Folder of runs.
        name: The run's name.
        steps: Where it ends.
        layout: Fields of MegatronStrategy.
        base: Checkpoint to fine-tune; None pretrains.
        optimizer_too: Whether the base's optimizer state is taken too.
        lora: Whether adapters are trained instead of all weights.
        packed: Whether samples are packed.
        every: Steps between checkpoints; None saves at the end only.
        asynchronous: Whether checkpoints are written beside training.
        model: Fields of the model's configuration.
        trainer: Fields of Trainer.
        ckpt: Fields of ModelCheckpoint.
        lr: Learning rate.
        optimizer: Further fields of OptimizerConfig.
        precision: What is computed in (MegatronMixedPrecision).
        tokenizer: What data is tokenized with, in fine-tuning.
        bits: Of the base under adapters: 4 or 8 where it is quantised.
        adapters: Adapter checkpoint to train on; ``base`` is then where its base is.
        report: Whether a report is written at the end: its charts take longer than the steps.
    """

    folder: str
    name: str = "run"
    steps: int = 4
    layout: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    optimizer_too: bool = False
    lora: bool = False
    packed: bool = False
    every: int | None = None
    asynchronous: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    ckpt: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    optimizer: dict[str, Any] = field(default_factory=dict)
    precision: str = "32"
    tokenizer: str = "embedded://mixtral_tiny"
    bits: int | None = None
    adapters: str | None = None
    report: bool = False

    @property
    def run_dir(self) -> Path:
        """RUN."""
        return Path(self.folder) / self.name


@dataclass
class Seen:
    """What one rank saw of a run.

    Attributes:
        result: What `api` returned.
        losses: Step -> loss, of this start.
        samples: The tokens of every microbatch of training, hashed, in order.
        state: Hash of this rank's weights, optimizer state and random state at the end.
    """

    result: dict[str, Any]
    losses: dict[int, float]
    samples: list[str]
    state: str


class Watcher:
    """A callback that looks at a run from inside."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.samples: list[str] = []
        self.state = ""

    def watch(self, data: Any) -> Any:
        """A data module that tells what is read from it."""
        original = data.train_batches

        def recorded(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for batch in original(*args, **kwargs):
                self.samples.append(hash_of([batch["tokens"]]))
                yield batch

        data.train_batches = recorded
        return data

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.losses[metrics["step"]] = metrics["loss"]

    def on_train_end(self, run: Any) -> None:
        adapters = any(".adapter." in name for name, _ in run.model[0].named_parameters())
        shards = model_shards(run.model, adapters_only=adapters)
        shards += optimizer_shards(run.optimizer, run.model, adapters_only=adapters)
        shards.sort(key=lambda shard: shard.place)
        tensors = [shard.tensor for shard in shards]
        states = repr(random_state()["python"]) + hash_of([torch.get_rng_state()])
        schedule = str(run.scheduler.num_steps)
        self.state = hash_of(tensors, states + schedule)


def hash_of(tensors: list[Tensor], text: str = "") -> str:
    """A hash of tensors' bytes and a text."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tiny_config(**changes: Any) -> MixtralConfigTiny:
    """Two layers, four experts, the embedded tokenizer's vocabulary."""
    fields: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
        "vocab_size": 2000, "max_position_embeddings": 64, "num_moe_experts": 4,
    }  # fmt: skip
    return MixtralConfigTiny(**(fields | changes))


def keep_world() -> None:
    """Let several runs share one world: a run's end leaves Megatron's groups, and not torch.distributed."""

    def shut_down() -> None:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()

    distributed.shut_down = shut_down


def start(job: Job, *more: Any) -> Seen:
    """Run a job in this process.

    Args:
        job: What.
        *more: Further callbacks.
    """
    keep_world()
    api.write_report_of = _write_report if job.report else lambda log: None
    watcher = Watcher()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments: dict[str, Any] = {
        "model": MixtralModel(tiny_config(**job.model)),
        "data": watcher.watch(_data(job)),
        "trainer": Trainer(
            accelerator="cpu",
            devices=world,
            max_steps=job.steps,
            log_every_n_steps=1,
            plugins=MegatronMixedPrecision(precision=job.precision),
            strategy=MegatronStrategy(**{"ckpt_async_save": job.asynchronous, **job.layout}),
            callbacks=[watcher, *more],
            **{"limit_val_batches": 1, **job.trainer},
        ),
        "log": NeMoLogger(
            name=job.name, log_dir=job.folder, ckpt=ModelCheckpoint(every_n_train_steps=job.every, **job.ckpt)
        ),
        "optim": MegatronOptimizerModule(
            OptimizerConfig(**{"lr": job.lr, "use_distributed_optimizer": True, **job.optimizer}),
            CosineAnnealingScheduler(warmup_steps=2, max_steps=30, min_lr=1e-4),
        ),
        "resume": AutoResume(
            RestoreConfig(job.base, load_optim_state=job.optimizer_too, adapter_path=job.adapters) if job.base else None
        ),
    }
    if job.base is None:
        run_dir = api.pretrain(**arguments)
    else:
        peft = LoRA(dim=4, alpha=8, dropout=0.1) if job.lora else None
        if job.bits:
            peft = QLoRA(dim=4, alpha=8, dropout=0.1, bits=job.bits)
        run_dir = api.finetune(**arguments, peft=peft, tokenizer=job.tokenizer)
    torch.distributed.barrier()
    result = json.loads((run_dir / "result.json").read_text())
    return Seen(result, watcher.losses, watcher.samples, watcher.state)


def _data(job: Job) -> Any:
    if job.base is None:
        return MockDataModule(
            vocab_size=2000, seq_length=32, micro_batch_size=1, global_batch_size=8, num_train_samples=60,
            num_val_samples=8,
        )  # fmt: skip
    specs = PackedSequenceSpecs(packed_sequence_size=64) if job.packed else None
    return SquadDataModule(
        dataset_root="embedded://squad", seq_length=64, micro_batch_size=1, global_batch_size=8,
        packed_sequence_specs=specs,
    )  # fmt: skip


def metrics_of(job: Job, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in a run's metrics.jsonl."""
    lines = (job.run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def checkpoints_of(job: Job) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return checkpoint.list_checkpoints(job.run_dir / "checkpoints")


class AtStep:
    """A callback that does something on one rank when a step begins."""

    def __init__(self, step: int, rank: int, action: Any) -> None:
        self.step, self.rank, self.action = step, rank, action

    def on_step_start(self, run: Any, step: int) -> None:
        if step == self.step and torch.distributed.get_rank() == self.rank:
            self.action(run)


def kill_self_after(seconds: float) -> None:
    """SIGKILL this process at some moment to come, whatever it is doing then."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Swallow what a run prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
