"""Write the adapters of another form as an adapter checkpoint of ours."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixtral_recipes.checkpoints.format.manifest import file_entries, write_manifest
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import write_file, write_metadata
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_adapter, hash_of_files, identity_of
from mixtral_recipes.checkpoints.lineage.links import mismatch, source_parent
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.stored_adapters import LowRank
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.mapping import WEIGHTS, instances
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.peft.names import tensor_key
from mixtral_recipes.settings.peft import LoRA, recorded
from mixtral_recipes.system.files import write_json


def write_adapter_checkpoint(
    output: Path,
    scheme: LoRA,
    tensors: Mapping[str, Tensor],
    *,
    base: Path,
    sources: Sequence[Parent],
    origin: dict[str, Any],
    left_behind: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write an adapter checkpoint.

    Args:
        output: The checkpoint to make; must not exist.
        scheme: What was trained.
        tensors: Every tensor by its key (`peft.names.tensor_key`).
        base: The checkpoint of the model it adapts; its context is copied.
        sources: What it was made from, for the lineage.
        origin: How, likewise; the manifest has it too.
        left_behind: Files of the source that are not in it.
        overwrite: Replace an existing checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: ``output`` is there already.
    """
    final = Path(os.path.abspath(output))
    read = (base, *(Path(source.path) for source in sources if source.path))
    with publish(final, "adapter", overwrite=overwrite, sources=read) as staging:
        folder, context = staging / "weights", staging / "context"
        folder.mkdir()
        shards = [Shard(key, t, (0,) * t.dim(), tuple(t.shape), tuple(t.shape)) for key, t in tensors.items()]
        written = write_file(folder, 0, shards, {})
        write_metadata(folder, [written])
        context.mkdir()
        sidecars.copy(sidecars.of(base / "context"), base / "context", context)
        facts = {"run": read[-1].name, "step": 0, "consumed_samples": 0, "skipped_steps": 0, "world_size": 1}
        write_json(context / "run.json", facts | {"metrics": {}, "kind": "adapter", "peft": recorded(scheme)})
        known = {f"weights/{written.name}": written.pieces}
        identity = Identity.of(hash_of_files(file_entries(staging, known)), context)
        parents = (Parent("base", lineage.of_checkpoint(base), os.path.abspath(base)), *sources)
        lineage.write(staging, Lineage("adapter", identity, origin=origin, parents=parents))
        extra = {"left_behind": list(left_behind)}
        write_manifest(staging, "adapter", source=origin | {"path": str(read[-1])}, known=known, extra=extra)
    return final


def adapter_parent(folder: Path, base: Path) -> Parent:
    """The parent of what was read from an adapter of another form; an export of ours brings its own lineage.

    Args:
        folder: The adapter's folder.
        base: The checkpoint of the model it is to adapt.

    Raises:
        CheckpointError: the folder is not what its lineage says, or ``base`` is not what the adapter was trained on.
    """
    parent = source_parent(folder, {"path": os.path.abspath(folder)}, hash_of_adapter(folder))
    adapted = next((found for record in parent.record.ancestors() if (found := record.parent("base"))), None)
    problem = adapted and mismatch(adapted.record.identity, identity_of(base))
    if problem:
        raise CheckpointError(f"{base} is not the base of {folder}: {problem}; pass the right one with --base.")
    return parent


def layer_names(dims: ModelShape) -> list[str]:
    """Every layer that adapters can be on, as a checkpoint names them, in the order of the mapping's table."""
    return [
        weight.adapted.format(layer=layer, expert=expert)
        for weight in WEIGHTS
        if weight.adapted
        for layer, expert in instances(weight, dims)
    ]


def adapted_layers(present: set[str], dims: ModelShape) -> tuple[list[str], dict[str, Any] | None]:
    """The layers that get an adapter, in the order of the mapping's table.

    Args:
        present: The names of those that have one.
        dims: The model's sizes.

    Returns:
        They, with the ``peft.layers`` and ``peft.experts`` that say so; where no setting can, every layer of the same
        kinds, and None.
    """
    kinds = {_kind(name) for name in present}
    names = [name for name in layer_names(dims) if _kind(name) in kinds]
    said = _said(present, names)
    return (names if said is None else [name for name in names if name in present]), said


def _said(present: set[str], names: Sequence[str]) -> dict[str, Any] | None:
    """The settings that say which of the layers ``names`` have an adapter; None where none can."""
    places = {name: _place(name) for name in names}
    dense = {layer for name, (layer, expert) in places.items() if expert is None and name in present}
    experts: dict[int, set[int]] = {}
    for name in present:
        layer, expert = places[name]
        if expert is not None:
            experts.setdefault(layer, set()).add(expert)
    layers = dense or set(experts)
    by_layer = {str(layer): sorted(experts.get(layer, ())) for layer in sorted(layers)} if experts else {}
    alike = by_layer[str(min(layers))] if len({tuple(numbers) for numbers in by_layer.values()}) == 1 else by_layer
    every_layer = {layer for layer, _ in places.values()}
    every_expert = {expert for _, expert in places.values() if expert is not None}
    found = {
        "layers": None if layers == every_layer else sorted(layers),
        "experts": None if not by_layer or alike == sorted(every_expert) else alike,
    }
    scheme = LoRA(target_modules=sorted({_kind(name) for name in names}), **found)
    if {name for name in names if scheme.adapts(name)} != present:
        return None
    return {name: value for name, value in found.items() if value is not None}


def _place(name: str) -> tuple[int, int | None]:
    """A layer's number, and its expert's."""
    parts = name.split(".")
    return int(parts[2]), int(parts[parts.index("experts") + 1]) if "experts" in parts else None


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def evened(
    names: Sequence[str], found: Mapping[str, LowRank], scheme: type[LoRA] = LoRA, **settings: Any
) -> tuple[LoRA, dict[str, Tensor]]:
    """One rank for each kind of layer, smaller ones filled up with zeros, and adapters of zeros for layers without.

    Args:
        names: The layers that get an adapter.
        found: The adapters by the layer's name; all of one kind have one scale.
        scheme: The kind of scheme.
        settings: What it says besides.

    Returns:
        The scheme, and every tensor by its key.
    """
    like: dict[str, LowRank] = {}
    ranks: dict[str, int] = {}
    for name, one in found.items():
        like.setdefault(_kind(name), one)
        ranks[_kind(name)] = max(ranks.get(_kind(name), 0), one.a.shape[0])
    tensors: dict[str, Tensor] = {}
    for name in names:
        kind = _kind(name)
        one = found.get(name) or LowRank(torch.zeros_like(like[kind].a), torch.zeros_like(like[kind].b), 1)
        halves = (2, one.b.shape[0] // 2) if kind == "linear_fc1" else one.b.shape[:1]
        more = ranks[kind] - one.a.shape[0]
        tensors[tensor_key(name, "lora_a")] = pad(one.a, (0, 0, 0, more)).contiguous()
        tensors[tensor_key(name, "lora_b")] = pad(one.b, (0, more)).view(*halves, -1).contiguous()
        if one.magnitude is not None:
            tensors[tensor_key(name, "magnitude")] = one.magnitude.to(one.a.dtype).view(halves).contiguous()
    alphas = {kind: one.scale * ranks[kind] for kind, one in like.items()}
    dim = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    made = scheme(
        target_modules=list(ranks),
        dim=dim,
        alpha=alpha,
        rank_pattern={kind: rank for kind, rank in ranks.items() if rank != dim},
        alpha_pattern={kind: value for kind, value in alphas.items() if value != alpha},
        **settings,
    )
    return made, tensors
