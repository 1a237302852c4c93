"""Read a Megatron torch_dist checkpoint as rows, however it was split when it was saved.

Training saves shards per tensor-parallel rank, sometimes with padding in the vocabulary, beside optimizer state; import
saves whole tensors. Both are a set of boxes of a stacked tensor, and a row is put together from the boxes it crosses.
"""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mixtral_recipes.checkpoints.format.reading import read_exactly
from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.checkpoints.format.stream import ITEM_BYTES, TORCH_NAMES, Extent
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.torch_dist_write import torch_save_frame
from mixtral_recipes.importers.mapping import WEIGHTS, Dims, Weight, disk_shape

_DTYPES = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Tile:
    """A box of one layer's and expert's matrix: where its rows and columns start, and where its data is."""

    row: int
    column: int
    columns: int
    extent: Extent


@dataclass(frozen=True)
class Tiled:
    """A matrix made of tiles that cover it without overlap."""

    dtype: str
    rows: int
    row_bytes: int
    tiles: tuple[Tile, ...]

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        item = ITEM_BYTES[self.dtype]
        for tile in self.tiles:
            first, last = max(start, tile.row), min(start + count, tile.row + tile.extent.rows)
            if first >= last:
                continue
            if tile.extent.row_bytes == self.row_bytes:
                tile.extent.read(first - tile.row, last - first, out[(first - start) * self.row_bytes :])
                continue
            rows = np.empty((last - first, tile.extent.row_bytes), dtype=np.uint8)
            tile.extent.read(first - tile.row, last - first, memoryview(rows).cast("B"))
            target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes].reshape(count, self.row_bytes)
            target[first - start : last - start, tile.column * item : (tile.column + tile.columns) * item] = rows


class SavedCheckpoint:
    """The weights in a torch_dist folder, checked against a model's sizes."""

    def __init__(self, folder: Path, dims: Dims) -> None:
        """Read ``.metadata`` and check that every weight is there.

        Raises:
            CheckpointError: names the weight that is missing or of another shape.
        """
        self._folder = folder
        self._metadata = read_metadata(folder)
        self._tiles: dict[tuple[str, int | None, int | None], list[Tile]] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for weight in WEIGHTS:
            self._add(weight, dims)
        self.unknown = self._unknown_weights()

    def matrix(self, weight: Weight, layer: int | None, expert: int | None) -> Tiled:
        """One layer's and expert's matrix of a table row (a vector is a matrix of one column)."""
        tiles = self._tiles.get((weight.disk, layer, expert), [])
        dtype = self.dtypes[weight.disk]
        rows, *rest = self._sizes[weight.disk][weight.per_layer + weight.per_expert :]
        columns = math.prod(rest)
        if sum(tile.columns * tile.extent.rows for tile in tiles) != rows * columns:
            where = "" if layer is None else f" of layer {layer}" + ("" if expert is None else f", expert {expert}")
            raise CheckpointError(f"{self._folder}: parts of {weight.disk}{where} are missing.")
        return Tiled(dtype, rows, columns * ITEM_BYTES[dtype], tuple(tiles))

    def _add(self, weight: Weight, dims: Dims) -> None:
        entry = self._metadata.state_dict_metadata.get(weight.disk)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: {weight.disk} is missing from the checkpoint.")
        if entry.properties.dtype not in _DTYPES:
            raise CheckpointError(f"{self._folder}: {weight.disk} is {entry.properties.dtype}; no exact export exists.")
        self.dtypes[weight.disk] = _DTYPES[entry.properties.dtype]
        self._sizes[weight.disk] = tuple(entry.size)
        _check_shape(self._folder, weight, tuple(entry.size), disk_shape(weight, dims))
        stacked = weight.per_layer + weight.per_expert
        for chunk in entry.chunks:
            self._add_chunk(weight, tuple(chunk.offsets), tuple(chunk.sizes), stacked)

    def _add_chunk(self, weight: Weight, offsets: Sequence[int], sizes: Sequence[int], stacked: int) -> None:
        """File a box under every layer and expert it crosses."""
        rows, columns = sizes[stacked], math.prod(sizes[stacked + 1 :])
        row, column = offsets[stacked], (*offsets[stacked + 1 :], 0)[0]
        extent = self._extent(weight, offsets, sizes, columns)
        for number, index in enumerate(np.ndindex(*sizes[:stacked])):
            where = [start + step for start, step in zip(offsets, index, strict=False)]
            layer = where[0] if weight.per_layer else None
            expert = where[-1] if weight.per_expert else None
            tile = Tile(row, column, columns, extent.slice(number * rows, rows))
            self._tiles.setdefault((weight.disk, layer, expert), []).append(tile)

    def _extent(self, weight: Weight, offsets: Sequence[int], sizes: Sequence[int], columns: int) -> Extent:
        where = self._storage[weight.disk, tuple(offsets)]
        dtype = self.dtypes[weight.disk]
        path = str(self._folder / where.relative_path)
        start = where.offset + _data_offset(path, where.offset, where.length, dtype, tuple(sizes))
        return Extent(path, start, dtype, math.prod(sizes) // columns, columns * ITEM_BYTES[dtype])

    @property
    def _storage(self) -> dict[tuple[str, tuple[int, ...]], Any]:
        if not hasattr(self, "_by_place"):
            self._by_place = {
                (index.fqn, tuple(index.offset)): where
                for index, where in cast(dict[Any, Any], self._metadata.storage_data).items()
                if index.offset is not None
            }
        return self._by_place

    def _unknown_weights(self) -> list[str]:
        """Keys that look like model weights and are in no row of the table."""
        known = {weight.disk for weight in WEIGHTS}
        return sorted(
            key
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and key.startswith(("decoder.", "embedding.", "output_layer."))
            and key not in known
        )


def _check_shape(folder: Path, weight: Weight, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    padded = weight.shapes[0].startswith("V") and len(found) == len(expected) and found[0] >= expected[0]
    if found != expected and not (padded and found[1:] == expected[1:]):
        raise CheckpointError(
            f"{folder}: {weight.disk} has shape {list(found)}, context/config.json calls for {list(expected)}."
        )


def _data_offset(path: str, offset: int, length: int, dtype: str, sizes: tuple[int, ...]) -> int:
    """Where a saved item's numbers start, counted from the item's start."""
    prefix, suffix = torch_save_frame(dtype, sizes)
    if length == len(prefix) + math.prod(sizes) * ITEM_BYTES[dtype] + len(suffix):
        head = bytearray(len(prefix))
        read_exactly(path, offset, memoryview(head))
        if _same_pickle(bytes(head), prefix):
            return len(prefix)
    return _searched_offset(path, offset, length, dtype, sizes)


def _same_pickle(head: bytes, prefix: bytes) -> bool:
    """Whether two torch.save files begin with the same description of a tensor (checksums aside)."""
    end = prefix.find(b"PK", 4)
    return end > 0 and head[64:end] == prefix[64:end]


def _searched_offset(path: str, offset: int, length: int, dtype: str, sizes: tuple[int, ...]) -> int:
    """As `_data_offset`, by letting torch open the item; for writers that lay items out differently."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.checkpoint.utils import _create_file_view

    try:
        with open(path, "rb") as file, FakeTensorMode():
            view = _create_file_view(file, offset, length)
            tensor = torch.load(cast(Any, view), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: the item at byte {offset} cannot be read; the file is damaged.") from error
    start = tensor.untyped_storage()._checkpoint_offset
    if tuple(tensor.shape) != sizes or _DTYPES.get(tensor.dtype) != dtype or not tensor.is_contiguous() or not start:
        raise CheckpointError(f"{path}: the item at byte {offset} is not the tensor .metadata describes.")
    return start + tensor.storage_offset() * ITEM_BYTES[dtype]
