"""Where a run starts: from its own newest complete checkpoint, from other weights, or from scratch."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.folder import list_checkpoints
from mixtral_recipes.checkpoints.format.integrity import damage_together, verify_together
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.quantized_cache import read_cached, write_cache
from mixtral_recipes.checkpoints.shards import QuantizedWeight, model_shards, quantized_weights
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.peft.quantized.layers import quantize_into
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.system.ranks import first

_READ_AHEAD = 2  # weights that are read while another is quantised


def find_checkpoint(resume: AutoResume, checkpoints: Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to resume from, its files verified, or None to start afresh. All ranks call it together.

    Args:
        resume: The recipe's settings.
        checkpoints: The run's folder of checkpoints.
        say: Called with each checkpoint that was passed over, and why.

    Raises:
        CheckpointError: one was required and there is none, all are damaged, or the named one was not saved by a run.
    """
    if resume.resume_from_path is not None:
        path = Path(resume.resume_from_path).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"resume.resume_from_path={path}: no such checkpoint.")
        verify_together(path)
        if not first(lambda: StoredWeights(path / "weights").has_optimizer):
            raise CheckpointError(
                f"resume.resume_from_path={path}: it was not saved by a run, so there is nothing to resume; start from "
                "it with --restore-from, or with resume.restore_config.adapter_path if it is an adapter."
            )
        return path.resolve()
    found = first(lambda: _own_checkpoints(resume, checkpoints)) if resume.resume_if_exists else []
    for path in reversed(found):
        damage = damage_together(path)
        if damage is None:
            return path
        say(f"WARNING: skipping {path.name}: {damage}")
    if found:
        raise CheckpointError(
            f"{found[0].parent}: none of its {len(found)} checkpoint(s) is intact; start a run with another --name, or "
            "set resume.resume_if_exists=False to start over in this folder."
        )
    if resume.resume_if_exists and not resume.resume_ignore_no_checkpoint:
        raise CheckpointError(f"resume.resume_ignore_no_checkpoint=False, but {checkpoints} has no checkpoint.")
    return None


def _own_checkpoints(resume: AutoResume, checkpoints: Path) -> list[Path]:
    """The run's own checkpoints, or those of the folder that stands in for them, oldest first.

    Raises:
        CheckpointError: there is no such folder.
    """
    own = list_checkpoints(checkpoints)
    if own or resume.resume_from_directory is None:
        return own
    folder = Path(resume.resume_from_directory).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"resume.resume_from_directory={folder}: no such folder.")
    of_run = folder / "checkpoints"
    return [path.resolve() for path in list_checkpoints(of_run if of_run.is_dir() else folder)]


def load_model(
    model: list[Any],
    folder: Path,
    *,
    adapters_only: bool = False,
    new_rows: range = range(0),
    cache: Path | None = None,
) -> None:
    """Read weights into a model from a checkpoint folder written under any layout.

    Args:
        model: This rank's chunks, without DDP.
        folder: The checkpoint.
        adapters_only: Whether only the adapters are read.
        new_rows: Tokens that the checkpoint has no row for, which follow on its own: their rows in the embedding and in
            the output layer become the mean of its rows.
        cache: Where the quantised weights are kept, or will be; None keeps them nowhere.

    Raises:
        CheckpointError: the folder is not a checkpoint, or lacks a tensor of this model.
    """
    weights = folder / "weights"
    if not weights.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no weights folder.")
    stored, shards = StoredWeights(weights), model_shards(model, adapters_only=adapters_only)
    stored.read_into(shards)
    if not adapters_only:
        _read_quantized(stored, list(quantized_weights(model)), cache)
    if new_rows:
        _fill_new_rows(stored, shards, new_rows)


def _read_quantized(stored: StoredWeights, weights: list[QuantizedWeight], cache: Path | None) -> None:
    """Read weights one by one, a few ahead, and quantise each, unless they are kept; all ranks call it together.

    Each is quantised from the dtype it is stored in, so that its bytes depend on the checkpoint alone.
    """

    if cache is not None and read_cached(cache, weights):
        return

    def read(weight: QuantizedWeight) -> Tensor:
        memory, shards = weight.allocated(stored.dtype(weight.key))
        stored.read_into(shards)
        return memory

    with ThreadPoolExecutor(_READ_AHEAD) as threads:
        waiting: deque[tuple[QuantizedWeight, Future[Tensor]]] = deque()
        for weight in weights:
            waiting.append((weight, threads.submit(read, weight)))
            if len(waiting) > _READ_AHEAD:
                _quantize(*waiting.popleft())
        for each in waiting:
            _quantize(*each)
    if cache is not None:
        write_cache(cache, weights)


def _quantize(weight: QuantizedWeight, read: "Future[Tensor]") -> None:
    quantize_into(weight.layer, read.result().to(weight.layer.device))


def _fill_new_rows(stored: StoredWeights, shards: list[Shard], new_rows: range) -> None:
    """Start new tokens' rows from the mean of the checkpoint's; padding behind them stays as it is."""
    with torch.no_grad():
        for shard in shards:
            first, last = shard.offsets[0], shard.offsets[0] + shard.sizes[0]
            mine = range(max(first, new_rows.start), min(last, new_rows.stop))
            if not shard.padded or not mine:
                continue
            mean = stored.read_tensor(shard.key, torch.float32)[: new_rows.start].mean(0)
            shard.tensor.view(shard.sizes)[mine.start - first : mine.stop - first] = mean
