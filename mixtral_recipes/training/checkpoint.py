"""Training checkpoints: Megatron `dist_checkpointing` folders that load under any layout.

A checkpoint is a folder: ``weights/`` (torch_dist: model or adapters, optimizer, schedule, random state), ``context/``
(the model's config.json, tokenizer files, ``run.json``) and ``manifest.json``. It has its final name only when complete.
"""

import json
import random
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemWriter

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.peft.lora import adapters_of
from mixtral_recipes.training.manifest import write_manifest
from mixtral_recipes.training.optimizer import load_optimizer

# The optimizer's state is written as one tensor per parameter, so that any layout can read it.
_OPTIMIZER_FORM = {"distrib_optim_sharding_type": "fully_reshardable"}


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format written by this process.

    Megatron's own strategy starts a process per save even when it waits for it: seconds of imports each time.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> None:
        """Write this rank's shards; all ranks call it together."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.thread_count, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
            ),
        )


@dataclass
class ModelCheckpoint:
    """When checkpoints are written and which are kept, in NeMo's spelling.

    Attributes:
        monitor: Metric that ranks checkpoints.
        mode: ``"min"`` or ``"max"``.
        save_last: Whether the run's end (or stop) is always saved.
        save_top_k: How many of the best are kept besides the newest; -1 keeps all, 0 none.
        every_n_train_steps: Steps between checkpoints; None: by time, or at the end only.
        train_time_interval: Time between checkpoints.
        filename: Folder name; ``{model_name}``, ``{val_loss}``, ``{step}`` and ``{consumed_samples}`` are filled in.
    """

    monitor: str = "val_loss"
    mode: str = "min"
    save_last: bool | str = True
    save_top_k: int = 3
    every_n_train_steps: int | None = None
    train_time_interval: timedelta | None = None
    filename: str = "{model_name}--{val_loss:.2f}-{step}-{consumed_samples}"


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0


def model_state(model: list[Any], *, adapters_only: bool) -> dict[str, Any]:
    """The model's tensors with their place in the whole, keyed as a checkpoint keys them.

    Args:
        model: This rank's chunks, without DDP.
        adapters_only: Whether only LoRA's tensors are wanted (or only the base's, without them).
    """
    if adapters_only:
        return {key: value for a in adapters_of(model) for key, value in a.sharded_state_dict().items()}
    state: dict[str, Any] = {}
    for number, chunk in enumerate(model):
        for name, value in chunk.sharded_state_dict(prefix="").items():
            # Empty except under Transformer Engine's delayed scaling, whose state belongs to one layout; adapters
            # are saved by their own keys.
            if not name.endswith("_extra_state") and ".adapter." not in name:
                state[f"{number}.{name}" if len(model) > 1 else name] = value
    return state


def load_model(model: list[Any], folder: Path, *, adapters_only: bool = False) -> None:
    """Read weights into a model from a checkpoint folder written under any layout.

    Raises:
        CheckpointError: the folder is no checkpoint, or lacks a tensor of this model.
    """
    weights = folder / "weights"
    if not weights.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no weights folder.")
    state = model_state(model, adapters_only=adapters_only)
    try:
        loaded = dist_checkpointing.load({"model": state}, str(weights))["model"]
    except (KeyError, dist_checkpointing.core.CheckpointingException, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit this model ({str(error).splitlines()[0]}).") from error
    _put(model, loaded, adapters_only=adapters_only)


def _put(model: list[Any], loaded: dict[str, Any], *, adapters_only: bool) -> None:
    with torch.no_grad():
        if adapters_only:
            for adapter in adapters_of(model):
                adapter.lora_a.copy_(loaded[f"{adapter.key}.lora_a"])
                adapter.lora_b.copy_(loaded[f"{adapter.key}.lora_b"])
            return
        for number, chunk in enumerate(model):
            own = f"{number}." if len(model) > 1 else ""
            tensors = {k.removeprefix(own): v for k, v in loaded.items() if k.startswith(own)}
            missing = [k for k in chunk.load_state_dict(tensors, strict=False).missing_keys if _is_weight(k)]
            if missing:
                raise CheckpointError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} more.")


def _is_weight(key: str) -> bool:
    return not key.endswith("_extra_state") and ".adapter." not in key


class Checkpointer:
    """Saves and restores one run's whole state.

    Attributes:
        folder: Where this run's checkpoints stand.
    """

    def __init__(
        self,
        folder: Path,
        policy: ModelCheckpoint,
        *,
        model_name: str,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        adapters_only: bool,
        context: Path | None,
        facts: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.model_name = model_name
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.adapters_only = adapters_only
        self.context = context
        self.facts = facts

    def _state(self, *, loading: bool) -> dict[str, Any]:
        model = model_state(self.model, adapters_only=self.adapters_only)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_FORM),
            "scheduler": self.scheduler.state_dict(),
        }

    def save(self, position: Position, metrics: dict[str, float]) -> Path:
        """Write a checkpoint; all ranks call it together. It gets its name when every rank has finished."""
        name = self.policy.filename.format(
            model_name=self.model_name,
            val_loss=metrics.get("val_loss", float("nan")),
            step=position.step,
            consumed_samples=position.consumed_samples,
        )
        final, staging = self.folder / name, self.folder / f".staging-{name}"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / "weights").mkdir(parents=True)
        torch.distributed.barrier()
        state = self._state(loading=False) | {"rng": _rng_object()}
        dist_checkpointing.save(state, str(staging / "weights"), InProcessSave())
        if torch.distributed.get_rank() == 0:
            self._write_context(staging / "context", position, metrics)
            write_manifest(staging, "adapter" if self.adapters_only else "training", source={"run": self.model_name})
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._prune()
        torch.distributed.barrier()
        return final

    def _write_context(self, context: Path, position: Position, metrics: dict[str, float]) -> None:
        if self.context is not None:
            shutil.copytree(self.context, context)
        context.mkdir(exist_ok=True)
        (context / "run.json").write_text(
            json.dumps(
                {
                    "step": position.step,
                    "consumed_samples": position.consumed_samples,
                    "world_size": torch.distributed.get_world_size(),
                    "metrics": metrics,
                    **self.facts,
                },
                indent=1,
            )
        )

    def _prune(self) -> None:
        """Delete what the policy does not keep: all but the newest and the best ``save_top_k``."""
        keep = self.policy.save_top_k
        if keep < 0:
            return
        found = list_checkpoints(self.folder)
        sign = 1 if self.policy.mode == "min" else -1

        def score(path: Path) -> float:
            value = read_run_facts(path).get("metrics", {}).get(self.policy.monitor)
            return sign * value if value is not None else float("inf")

        # Among equals the newer is better; sorted() is stable.
        best = sorted(reversed(found), key=score)[:keep]
        for path in found[:-1]:
            if path not in best:
                shutil.rmtree(path)

    def load(self, checkpoint: Path) -> Position:
        """Take up a checkpoint of this run, also from another layout.

        The random state is restored when as many processes run as did; otherwise it continues from the seed.
        """
        facts = read_run_facts(checkpoint)
        weights = str(checkpoint / "weights")
        same_size = facts["world_size"] == torch.distributed.get_world_size()
        state = self._state(loading=True) | ({"rng": _rng_object()} if same_size else {})
        loaded = dist_checkpointing.load(state, weights)
        _put(self.model, loaded["model"], adapters_only=self.adapters_only)
        load_optimizer(self.optimizer, loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        if same_size:
            _set_rng(loaded["rng"])
        return Position(facts["step"], facts["consumed_samples"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if not p.name.startswith(".") and (p / "context" / "run.json").is_file()]
    return sorted(found, key=lambda p: read_run_facts(p)["step"])


def read_run_facts(checkpoint: Path) -> dict[str, Any]:
    """What ``context/run.json`` says: step, consumed_samples, world_size, metrics and the run's own facts."""
    try:
        return json.loads((checkpoint / "context" / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: context/run.json cannot be read ({error}).") from error


def _rng_object() -> ShardedObject:
    """This rank's random state, to be saved or to be filled."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("rng_state", states, (world,), (rank,))


def _set_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["megatron"])


