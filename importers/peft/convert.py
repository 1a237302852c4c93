"""A peft folder -> an adapter checkpoint, which training goes on from and export merges.

A Megatron layer has one A for all its rows. Where the source has several (q, k and v apart), they are stacked, and B
gets blocks: exact, at the sum of their ranks. Equal ones, such as those of an export of ours, stay one.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.lineage.identity import hash_of_adapter
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_checkpoint import (
    chosen,
    folder_source,
    layer_names,
    write_adapter_checkpoint,
)
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS, canonical_sources, shape_of
from mixtral_recipes.importers.peft.source import PeftFolder, Projection, open_adapter
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.peft.names import tensor_key
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
    layers, chosen_layers = _megatron_layers(opened, dims)
    scheme, tensors = _even(opened, layers, chosen_layers)
    keys = {weight.hf[0]: weight.disk for weight in WEIGHTS}
    tensors |= {keys[name]: tensor.contiguous() for name, tensor in opened.whole.items()}
    return write_adapter_checkpoint(
        output,
        scheme,
        tensors,
        base=base,
        sources=[folder_source(opened.folder, hash_of_adapter(opened.folder))],
        origin={"layout": "peft"},
        left_behind=sidecars.left_behind(sidecars.names_in(folder), _READ),
        overwrite=overwrite,
    )


class _Layer:
    """The factors of one Megatron layer, put together from its projections'."""

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self.module = name.rsplit(".", 1)[-1]
        self.rows = rows
        self.parts: list[tuple[Projection, list[tuple[int, int]]]] = []

    @property
    def scale(self) -> float:
        return self.parts[0][0].scale

    @property
    def empty(self) -> bool:
        """Whether it changes nothing and cannot learn to: zeros stand in for what is not adapted."""
        return not any(part.a.any() or part.b.any() for part, _ in self.parts)

    def factors(self, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [r, in], B [rows, r] and magnitude, for a product multiplied by ``scale``."""
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
        return a, b, magnitude


def _megatron_layers(opened: PeftFolder, dims: ModelShape) -> tuple[list[_Layer], dict[str, Any]]:
    """Every adapted Megatron layer with the projections it consists of, and the settings that say which they are."""
    sources = canonical_sources(dims)
    layers: dict[str, _Layer] = {}
    for projection in opened.projections:
        weight, layer, expert, _ = sources[projection.names[0]]
        if not weight.adapted:
            raise CheckpointError(f"{opened.folder}: {projection.names[0]} has no adapter here.")
        name = weight.adapted.format(layer=layer, expert=expert)
        rows = sum(shape_of(shape, dims)[0] for shape in weight.shapes)
        places = [place for part in projection.names for place in sources[part][3]]
        layers.setdefault(name, _Layer(name, rows)).parts.append((projection, places))
    if opened.dora:
        for found in layers.values():
            if sum(stop - start for _, places in found.parts for start, stop in places) != found.rows:
                raise CheckpointError(
                    f"{opened.folder}: DoRA adapts only a part of {found.name}, whose rows are trained together here; "
                    "merge it with peft's merge_and_unload and import the model."
                )
    return _complete(opened, {name: found for name, found in layers.items() if not found.empty}, layers, dims)


def _complete(
    opened: PeftFolder, present: dict[str, _Layer], every: dict[str, _Layer], dims: ModelShape
) -> tuple[list[_Layer], dict[str, Any]]:
    """The layers in the model's order, and the settings that say which they are.

    Where no setting can say it, the missing ones get adapters of zeros.

    Args:
        opened: The source.
        present: Those with an adapter that is not all zeros.
        every: Those that the source has.
        dims: The model's sizes.
    """
    found = present or every
    kinds = {one.module for one in found.values()}
    names = [name for name in layer_names(dims) if name.rsplit(".", 1)[-1] in kinds]
    said = chosen(set(found), names)
    if said is not None:
        return [found[name] for name in names if name in found], said
    missing = [name for name in names if name not in every]
    if missing and opened.dora:
        raise CheckpointError(f"{opened.folder}: DoRA adapts some layers and not {missing[0]}, which has no form here.")
    return [every[name] if name in every else _absent(name, every) for name in names], {}


def _absent(name: str, layers: dict[str, _Layer]) -> _Layer:
    """A layer that the source leaves as it is, with an adapter of zeros."""
    like = next(found for found in layers.values() if found.module == name.rsplit(".", 1)[-1])
    part = like.parts[0][0]
    zero = Projection((), torch.zeros_like(part.a), part.b.new_zeros(like.rows, part.a.shape[0]), part.scale)
    found = _Layer(name, like.rows)
    found.parts.append((zero, [(0, like.rows)]))
    return found


def _even(opened: PeftFolder, layers: list[_Layer], choice: dict[str, Any]) -> tuple[LoRA, dict[str, Tensor]]:
    """One rank and scale for each kind of layer, the smaller ones filled up with zeros; and every tensor by its key."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    ranks: dict[str, int] = {}
    found = []
    for layer in layers:
        scale = scales.setdefault(layer.module, layer.scale)
        a, b, magnitude = layer.factors(scale)
        ranks[layer.module] = max(ranks.get(layer.module, 0), a.shape[0])
        found.append((layer, a, b, magnitude))
    for layer, a, b, magnitude in found:
        more = ranks[layer.module] - a.shape[0]
        halves = (2, layer.rows // 2) if layer.module == "linear_fc1" else (layer.rows,)
        parts = {
            "lora_a": torch.nn.functional.pad(a, (0, 0, 0, more)),
            "lora_b": torch.nn.functional.pad(b, (0, more)).view(*halves, -1),
        }
        if magnitude is not None:
            parts["magnitude"] = magnitude.to(a.dtype).view(halves)
        tensors |= {tensor_key(layer.name, name): tensor.contiguous() for name, tensor in parts.items()}
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    dim = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    scheme = (DoRA if opened.dora else LoRA)(
        target_modules=list(ranks),
        dim=dim,
        alpha=alpha,
        dropout=float(opened.settings.get("lora_dropout") or 0.0),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != dim},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        modules_to_save=[ours for ours, theirs in HF_WHOLE.items() if any(theirs in name for name in opened.whole)],
        **choice,
    )
    scheme.targets()  # refuses what no run would take
    return scheme, tensors
