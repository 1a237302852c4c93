"""What a Megatron checkpoint is written as: the boxes of its tensors, and its objects."""

import itertools
from collections.abc import Mapping, Sequence

import torch

from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.format.stream import Part, Record
from mixtral_recipes.checkpoints.format.writer import Item, object_item, rows_item, torch_bytes
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, disk_shape, instances, merge_blocks, names_of
from mixtral_recipes.layout.shapes import ModelShape


def tensor_items(
    dims: ModelShape, tensors: Mapping[str, Rows], dtypes: Mapping[str, str], prefix: str = ""
) -> list[tuple[Item, Record]]:
    """Every tensor item of a checkpoint: one per layer, expert and, where rows are stacked, canonical tensor.

    Args:
        dims: The model's sizes.
        tensors: The canonical tensors.
        dtypes: Key on disk -> dtype.
        prefix: What stands before every key.
    """
    items: list[tuple[Item, Record]] = []
    for weight in WEIGHTS:
        whole = disk_shape(weight, dims)
        for layer, expert in instances(weight, dims):
            stacked = [index for index in (layer, expert) if index is not None]
            columns = whole[len(stacked) + 1 :]
            blocks = merge_blocks(weight, dims, layer, expert)
            row = 0
            for group in [[block] for block in blocks] if weight.transform == "stack" else [blocks]:
                parts = [Part(block.name, tensors[block.name], block.start, block.stop) for block in group]
                rows = sum(block.stop - block.start for block in group)
                offsets, sizes = (*stacked, row, *(0 for _ in columns)), (*(1 for _ in stacked), rows, *columns)
                items.append(rows_item(prefix + weight.disk, dtypes[weight.disk], offsets, sizes, whole, parts))
                row += rows
    return items


def stacked_dtypes(dims: ModelShape, dtypes: Mapping[str, str], where: object) -> dict[str, str]:
    """Key on disk -> the one dtype of the canonical tensors that are stacked there.

    Args:
        dims: The model's sizes.
        dtypes: Of every canonical tensor.
        where: What they are read from, for errors.

    Raises:
        CheckpointError: they have several.
    """
    found: dict[str, str] = {}
    for weight in WEIGHTS:
        names = names_of(weight, dims)
        kinds = {dtypes[name] for name in names}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{where}: {min(names)} and its counterparts are stored as {' and '.join(sorted(kinds))}; choose one "
                "with --dtype."
            )
        found[weight.disk] = kinds.pop()
    return found


def _extra_state_names(weight: Weight, dims: ModelShape) -> list[str]:
    """Unique names of the states of a weight's module, as Megatron's ShardedObject spells them."""
    shape = [dims.num_layers] * weight.per_layer + [dims.num_moe_experts] * weight.per_expert or [1]
    return [
        f"{weight.extra_state}/shard_{'.'.join(map(str, where))}_{'.'.join(map(str, shape))}"
        for where in itertools.product(*map(range, shape))
    ]


def object_items(dims: ModelShape, per_layer: Sequence[str] = (), prefix: str = "") -> list[tuple[Item, Record]]:
    """The items that are not tensors: "no FP8" for every module that keeps a state.

    Args:
        dims: The model's sizes.
        per_layer: Keys of further states, of which every layer has one.
        prefix: What stands before every key.
    """
    empty = torch_bytes([torch.empty(0, dtype=torch.uint8)])
    names = [name for weight in WEIGHTS if weight.extra_state for name in _extra_state_names(weight, dims)]
    names += [f"{key}/shard_{layer}_{dims.num_layers}" for key in per_layer for layer in range(dims.num_layers)]
    return [object_item(prefix + name, empty) for name in names]


def common_item() -> tuple[Item, Record]:
    """What Megatron from 0.19 on keeps beside the tensors; of a model as it is here, nothing."""
    return object_item("common_state/shard_0_1", torch_bytes([{}]))
