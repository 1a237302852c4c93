"""Several adapters of one base as one: their weighted sum, exact at the sum of their ranks, or cut to a rank by SVD.

``sum_i w_i s_i B_i A_i`` is ``[w_1 s_1 B_1 | w_2 s_2 B_2 | ...]`` times the A's one below the other. The product is
never formed: its singular values are those of the small matrix that is left of the two factors without their
orthogonal parts (QR).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Parent
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_checkpoint import (
    adapted_layers,
    evened,
    layer_names,
    write_adapter_checkpoint,
)
from mixtral_recipes.importers.convert.stored_adapters import LowRank, StoredAdapters, open_adapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.peft.whole import WEIGHTS as WHOLE
from mixtral_recipes.settings.peft import DoRA


@dataclass(frozen=True)
class Part:
    """An adapter to be added.

    Attributes:
        checkpoint: An adapter checkpoint.
        weight: What it is multiplied by.
    """

    checkpoint: Path
    weight: float


@dataclass(frozen=True)
class Merged:
    """What was made.

    Attributes:
        folder: The adapter checkpoint.
        rank: Its largest rank.
        lost: What the cut to a rank left out: the size (Frobenius) of the difference over that of the sum; 0 without.
    """

    folder: Path
    rank: int
    lost: float


def merge_adapters(
    parts: Sequence[Part], output: Path, *, rank: int | None = None, base: Path | None = None, overwrite: bool = False
) -> Merged:
    """Write the weighted sum of adapters as an adapter checkpoint, which exports, merges and trains on as any.

    What was trained whole (``modules_to_save``) moves from the base by the weighted sum of its changes.

    Args:
        parts: The adapters, all of the same base.
        output: The checkpoint to make; must not exist.
        rank: The rank that each layer's sum is cut to; None keeps all of it, at the sum of the ranks.
        base: Where their base is now; None takes the place the first one's was at.
        overwrite: Replace an existing adapter checkpoint.

    Raises:
        CheckpointError: one is no LoRA adapter, is damaged, or of another base.
    """
    if not parts or not all(math.isfinite(part.weight) and part.weight for part in parts):
        raise CheckpointError("pass at least one adapter, each with a finite weight other than 0.")
    if rank is not None and rank < 1:
        raise CheckpointError(f"--rank {rank}: it must be at least 1.")
    opened = [_open(part.checkpoint) for part in parts]
    place = base_of(parts[0].checkpoint, base)
    for part in parts[1:]:
        base_of(part.checkpoint, place)  # compares by content
    dims = hf_config.dims(read_config(place / "context"))
    sums, squares = _sums(parts, opened, dims), [0.0, 0.0]
    if rank is not None:
        sums = {name: _cut(one, rank, squares) for name, one in sums.items()}
    layers, said = adapted_layers(set(sums), dims)
    scheme, tensors = evened(layers, sums, **(said or {}))
    dtype = _dtype(opened, sums)
    found = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    whole = _whole(parts, opened, place)
    scheme.modules_to_save = [name for name, key in WHOLE.items() if key in whole]
    for one in opened:
        one.check_all_read()
    words = " + ".join(f"{part.weight:g} x {part.checkpoint.name}" for part in parts)
    folder = write_adapter_checkpoint(
        output,
        scheme,
        found | whole,
        base=place,
        sources=[
            Parent("merged", lineage.of_checkpoint(part.checkpoint), str(part.checkpoint.absolute())) for part in parts
        ],
        origin={"merged": words + (f", cut to rank {rank}" if rank else "")},
        overwrite=overwrite,
    )
    lost = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    return Merged(folder, max(one.a.shape[0] for one in sums.values()), lost)


def _open(checkpoint: Path) -> StoredAdapters:
    stored = open_adapters(checkpoint, "only adapters of the same base can be added")
    if isinstance(stored.scheme, DoRA):
        raise CheckpointError(
            f"{checkpoint} is a DoRA adapter, and DoRA's magnitudes cannot be added; `mixtral-recipes export` merges "
            "it into its base."
        )
    return stored


def _sums(parts: Sequence[Part], opened: list[StoredAdapters], dims: ModelShape) -> dict[str, LowRank]:
    """The sum of every layer that one of them adapts, in fp32, its scale 1."""
    sums: dict[str, LowRank] = {}
    for name in layer_names(dims):
        found = [(part.weight, stored.read(name)) for part, stored in zip(parts, opened, strict=True)]
        present = [(weight, adapter) for weight, adapter in found if adapter is not None]
        if present:
            sums[name] = LowRank(
                torch.cat([adapter.a for _, adapter in present]),
                torch.cat([weight * adapter.scale * adapter.b for weight, adapter in present], dim=1),
                1,
            )
    return sums


def _cut(one: LowRank, rank: int, squares: list[float]) -> LowRank:
    """The largest singular values of B A; adds the squares of those left out, and of all, to ``squares``."""
    q_b, r_b = torch.linalg.qr(one.b)
    q_a, r_a = torch.linalg.qr(one.a.t())
    u, values, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    squares[0] += values[rank:].double().square().sum().item()
    squares[1] += values.double().square().sum().item()
    root = values[:rank].sqrt()
    return LowRank((root.unsqueeze(1) * v[:rank]) @ q_a.t(), q_b @ (u[:, :rank] * root), 1)


def _whole(parts: Sequence[Part], opened: list[StoredAdapters], base: Path) -> dict[str, Tensor]:
    """What is trained whole: the base's plus the weighted sum of what the adapters changed."""
    found: dict[str, Tensor] = {}
    stored = StoredWeights(base / "weights")
    for weight in WEIGHTS:
        having = [(part, one) for part, one in zip(parts, opened, strict=True) if one.whole(weight.disk) is not None]
        if not having:
            continue
        start = stored.read_tensor(weight.disk, torch.float32)
        total = start.clone()
        for part, one in having:
            trained = one.read_whole(weight.disk, torch.float32)
            total += part.weight * (trained[: len(start)] - start[: len(trained)])  # rows that pad may differ
        found[weight.disk] = total.to(having[0][1].read_whole(weight.disk).dtype)
    return found


def _dtype(opened: list[StoredAdapters], sums: dict[str, LowRank]) -> torch.dtype:
    """The widest type that the factors are stored in."""
    kinds = [one.a.dtype for stored in opened for name in sums if (one := stored.read(name, None)) is not None]
    return functools.reduce(torch.promote_types, kinds)
