"""What an import writes: the boxes and objects of a Megatron checkpoint, and which process writes which."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, Rows
from mixtral_recipes.checkpoints.format.stream import Part, Record
from mixtral_recipes.checkpoints.format.writer import Item, object_item, rows_item, torch_bytes
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import WEIGHTS, Block, Weight, disk_shape, instances, merge_blocks
from mixtral_recipes.layout.shapes import ModelShape

COMMON_STATE = "common_state/shard_0_1"  # where Megatron >= 0.19 keeps what is not a tensor


@dataclass(frozen=True)
class Chunk:
    """One item on disk: a box of a stacked tensor, and the canonical rows that fill it."""

    key: str
    dtype: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


def chunks_of(dims: ModelShape, dtypes: dict[str, str]) -> list[Chunk]:
    """Every tensor item of a checkpoint: one per layer, expert and, where rows are stacked, canonical tensor.

    Args:
        dims: The model's sizes.
        dtypes: Key on disk -> dtype.
    """
    chunks: list[Chunk] = []
    for weight in WEIGHTS:
        size = disk_shape(weight, dims)
        for layer, expert in instances(weight, dims):
            blocks = merge_blocks(weight, dims, layer, expert)
            row = 0
            for group in [[block] for block in blocks] if weight.transform == "stack" else [blocks]:
                rows = sum(block.stop - block.start for block in group)
                stacked = [index for index in (layer, expert) if index is not None]
                chunks.append(
                    Chunk(
                        weight.disk,
                        dtypes[weight.disk],
                        size,
                        (*stacked, row, *(0 for _ in size[len(stacked) + 1 :])),
                        (*(1 for _ in stacked), rows, *size[len(stacked) + 1 :]),
                        tuple(group),
                    )
                )
                row += rows
    _check_complete(chunks)
    return chunks


def _check_complete(chunks: list[Chunk]) -> None:
    elements: dict[str, int] = {}
    for chunk in chunks:
        elements[chunk.key] = elements.get(chunk.key, 0) + math.prod(chunk.sizes)
    for chunk in chunks:
        if elements[chunk.key] != math.prod(chunk.size):
            raise CheckpointError(f"{chunk.key}: the items to write do not add up to {list(chunk.size)}.")


def items_of(tensors: Mapping[str, Rows], chunks: list[Chunk], objects: dict[str, bytes]) -> list[tuple[Item, Record]]:
    """Chunks and objects as the writer takes them; ``tensors`` says where the canonical rows are."""
    return [object_item(key, content) for key, content in objects.items()] + [
        rows_item(
            chunk.key,
            chunk.dtype,
            chunk.offsets,
            chunk.sizes,
            chunk.size,
            [Part(block.name, tensors[block.name], block.start, block.stop) for block in chunk.blocks],
        )
        for chunk in chunks
    ]


def _extra_state_names(weight: Weight, dims: ModelShape) -> list[str]:
    """Unique names of the states of a weight's module, as Megatron's ShardedObject spells them."""
    shape = [dims.num_layers] * weight.per_layer + [dims.num_moe_experts] * weight.per_expert or [1]
    return [
        f"{weight.extra_state}/shard_{'.'.join(map(str, where))}_{'.'.join(map(str, shape))}"
        for where in itertools.product(*map(range, shape))
    ]


def object_bytes(dims: ModelShape, per_layer: Sequence[str] = ()) -> dict[str, bytes]:
    """The items that are not tensors: an empty common state, and "no FP8" for every module that keeps a state.

    Args:
        dims: The model's sizes.
        per_layer: Keys of further states, of which every layer has one.
    """
    found = {COMMON_STATE: torch_bytes([{}])}
    empty = torch_bytes([torch.empty(0, dtype=torch.uint8)])
    for weight in WEIGHTS:
        if weight.extra_state:
            found |= dict.fromkeys(_extra_state_names(weight, dims), empty)
    for key in per_layer:
        found |= {f"{key}/shard_{layer}_{dims.num_layers}": empty for layer in range(dims.num_layers)}
    return found
