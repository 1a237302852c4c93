"""A peft folder -> an adapter checkpoint, from which training continues and which export merges.

A Megatron layer has one A for all its rows. Where the source has several (q, k and v apart), they are stacked, and B
gets blocks: exact, at the sum of their ranks. Equal ones, such as those of an export of ours, stay one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_checkpoint import (
    adapted_layers,
    adapter_parent,
    evened,
    write_adapter_checkpoint,
)
from mixtral_recipes.importers.convert.stored_adapters import LowRank
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS, canonical_sources, shape_of
from mixtral_recipes.importers.peft.source import PeftFolder, Projection, open_adapter
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import HF_WHOLE, DoRA, LoRA

# Files of a peft folder that are read; its tokenizer is its base's.
_READ = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lineage.json")


def write_adapter(folder: Path, settings: dict[str, Any], base: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Convert a peft folder into an adapter checkpoint.

    Args:
        folder: The peft folder.
        settings: What `source.read_settings` returned of it.
        base: The checkpoint of the model it adapts.
        output: The checkpoint to make; must not exist.
        overwrite: Replace an existing checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: the adapter cannot be taken exactly, or is of another base.
    """
    dims = hf_config.dims(read_config(base / "context"))
    opened = open_adapter(folder, settings, dims)
    scheme, tensors = _megatron_adapters(opened, dims)
    keys = {weight.hf[0]: weight.disk for weight in WEIGHTS}
    tensors |= {keys[name]: tensor.contiguous() for name, tensor in opened.whole.items()}
    return write_adapter_checkpoint(
        output,
        scheme,
        tensors,
        base=base,
        sources=[adapter_parent(opened.folder, base)],
        origin={"layout": "peft"},
        left_behind=sidecars.left_behind(sidecars.names_in(folder), _READ),
        overwrite=overwrite,
    )


class _Layer:
    """The factors of one Megatron layer, put together from its projections'."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.rows = rows
        self.parts: list[tuple[Projection, list[tuple[int, int]]]] = []

    @property
    def scale(self) -> float:
        return self.parts[0][0].scale

    @property
    def empty(self) -> bool:
        """Whether it changes nothing and cannot learn to: zeros stand in for what is not adapted."""
        return not any(part.a.any() or part.b.any() for part, _ in self.parts)

    def adapter(self, scale: float) -> LowRank:
        """The layer's adapter, its B for a product multiplied by ``scale``."""
        groups: list[tuple[Tensor, list[tuple[Projection, list[tuple[int, int]]]]]] = []
        for part in self.parts:
            group = next((members for a, members in groups if torch.equal(a, part[0].a)), None)
            if group is None:
                groups.append((part[0].a, [part]))
            else:
                group.append(part)
        a = torch.cat([matrix for matrix, _ in groups])
        b = torch.zeros(self.rows, a.shape[0], dtype=self.parts[0][0].b.dtype)
        magnitude = None if self.parts[0][0].magnitude is None else torch.zeros(self.rows)
        column = 0
        for matrix, members in groups:
            columns = slice(column, column + matrix.shape[0])
            column += matrix.shape[0]
            for projection, places in members:
                taken = 0
                for start, stop in places:
                    mine = slice(taken, taken + stop - start)
                    # The ratio is 1 wherever one scale holds for the layer, and nothing is rounded then.
                    ratio = projection.scale / scale
                    b[start:stop, columns] = projection.b[mine] if ratio == 1 else projection.b[mine] * ratio
                    if magnitude is not None and projection.magnitude is not None:
                        magnitude[start:stop] = projection.magnitude[mine].float()
                    taken += stop - start
        return LowRank(a, b, scale, magnitude)


def _megatron_layers(opened: PeftFolder, dims: ModelShape) -> dict[str, _Layer]:
    """Every adapted Megatron layer with the projections it consists of."""
    sources = canonical_sources(dims)
    layers: dict[str, _Layer] = {}
    for projection in opened.projections:
        weight, layer, expert, _ = sources[projection.names[0]]
        if not weight.adapted:
            raise CheckpointError(f"{opened.folder}: {projection.names[0]} cannot have an adapter in mixtral-recipes.")
        name = weight.adapted.format(layer=layer, expert=expert)
        rows = sum(shape_of(shape, dims)[0] for shape in weight.shapes)
        places = [place for part in projection.names for place in sources[part][3]]
        layers.setdefault(name, _Layer(name, rows)).parts.append((projection, places))
    if opened.dora:
        for found in layers.values():
            if sum(stop - start for _, places in found.parts for start, stop in places) != found.rows:
                raise CheckpointError(
                    f"{opened.folder}: DoRA adapts only a part of {found.name}, but mixtral-recipes supports it only "
                    "on all rows of a layer; merge it with peft's merge_and_unload and import the model."
                )
    return layers


def _megatron_adapters(opened: PeftFolder, dims: ModelShape) -> tuple[LoRA, dict[str, Tensor]]:
    """The scheme, and every tensor by its key.

    A layer whose adapter changes nothing is left out, where settings can say which layers have one.
    """
    every = _megatron_layers(opened, dims)
    found = {name: layer for name, layer in every.items() if not layer.empty} or every
    layers, said = adapted_layers(set(found), dims)
    if said is None:
        found = every
        missing = next((name for name in layers if name not in every), None)
        if missing and opened.dora:
            raise CheckpointError(
                f"{opened.folder}: DoRA adapts some layers but not {missing}, which mixtral-recipes does not support; "
                "merge it with peft's merge_and_unload and import the model."
            )
    scales: dict[str, float] = {}
    adapters: dict[str, LowRank] = {}
    for name in [name for name in layers if name in found]:
        scale = scales.setdefault(name.rsplit(".", 1)[-1], found[name].scale)
        adapters[name] = found[name].adapter(scale)
    scheme, tensors = evened(
        layers,
        adapters,
        DoRA if opened.dora else LoRA,
        dropout=float(opened.settings.get("lora_dropout") or 0.0),
        modules_to_save=[ours for ours, theirs in HF_WHOLE.items() if any(theirs in name for name in opened.whole)],
        **(said or {}),
    )
    scheme.targets()  # refuses what no run would take
    return scheme, tensors
