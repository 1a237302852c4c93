"""Read a torch_dist folder, whatever layout wrote it: into a rank's tensors, or as rows of one layer's matrices.

Nothing in it is run: ``.metadata`` goes through `restricted_pickle`, objects through ``torch.load(weights_only=True)``,
and of a tensor's archive only the description is read. No rank waits for another.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mixtral_recipes.checkpoints.format.archive import find_tensor, read_settings
from mixtral_recipes.checkpoints.format.matrix import Matrix, Tile
from mixtral_recipes.checkpoints.format.reading import read_through_cache
from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, Extent, spelled
from mixtral_recipes.checkpoints.format.shard import Shape, Shard
from mixtral_recipes.errors import CheckpointError

_Overlap = list[tuple[int, int]]  # per axis (start, end) in the whole tensor


@dataclass(frozen=True)
class Box:
    """A stored part of a tensor, and the archive that holds it.

    Attributes:
        key: The tensor's name.
        dtype: Of its elements.
        offsets: Where it starts in the whole tensor.
        sizes: Its extent.
        path: The archive's file.
        at: The archive's first byte.
        length: The archive's bytes.
    """

    key: str
    dtype: torch.dtype
    offsets: Shape
    sizes: Shape
    path: str
    at: int
    length: int

    @functools.cached_property
    def start(self) -> int:
        """The first element's byte in the file.

        Raises:
            CheckpointError: the archive is damaged, or holds another tensor.
        """
        try:
            with open(self.path, "rb") as file:
                found = find_tensor(file, self.at, self.length)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{self.path}: {self.key} cannot be read ({error}).") from error
        if found.shape != self.sizes or found.dtype != self.dtype:
            raise CheckpointError(f"{self.path}: {self.key} is not the tensor that .metadata describes.")
        return self.at + found.start

    @property
    def strides(self) -> Shape:
        return tuple(math.prod(self.sizes[axis + 1 :]) for axis in range(len(self.sizes)))

    def span(self, overlap: _Overlap) -> tuple[int, int]:
        """The first element of a part of it, and the one after the last."""
        steps = list(zip(overlap, self.offsets, self.strides, strict=True))
        first = sum((start - o) * stride for (start, _), o, stride in steps)
        return first, 1 + sum((end - 1 - o) * stride for (_, end), o, stride in steps)


class StoredWeights:
    """A torch_dist folder, opened for reading.

    Attributes:
        folder: Where it is.
        tensors: What ``.metadata`` says of every tensor, by name: shape, dtype, boxes.
    """

    def __init__(self, folder: Path) -> None:
        """Read what lies where.

        Raises:
            CheckpointError: ``.metadata`` is missing, damaged, or names something that is not a file in the folder.
        """
        self.folder = folder
        metadata = read_metadata(folder)
        self._entries = metadata.state_dict_metadata
        self._storage: dict[MetadataIndex, _StorageInfo] = dict(metadata.storage_data or {})
        self._nbytes = sum(_size_of(folder, name) for name in {str(i.relative_path) for i in self._storage.values()})
        self.tensors = {key: e for key, e in self._entries.items() if isinstance(e, TensorStorageMetadata)}
        self._boxes: dict[str, list[Box]] = {}
        self._tiles: dict[str, dict[Shape, list[Tile]]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds a run's optimizer: no import has one, nor a sum of adapters."""
        return any(key.startswith("optimizer.") for key in self.tensors)

    def read_object(self, key: str) -> Any:
        """An object saved under a key: plain values and tensors.

        Raises:
            CheckpointError: it is not there, damaged, or more than plain data.
        """
        path, info = self._object(key)
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged or hostile bytes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: {key} cannot be read ({reason}).") from error

    def read_settings(self, key: str) -> Any:
        """Settings saved under a key, with whatever values: those that are not plain are `restricted_pickle.Unread`.

        Raises:
            CheckpointError: they are not there, or damaged.
        """
        path, info = self._object(key)
        try:
            with path.open("rb") as file:
                return read_settings(file, info.offset, info.length)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read ({error}).") from error

    def _object(self, key: str) -> tuple[Path, _StorageInfo]:
        info = self._storage.get(MetadataIndex(key))
        if info is None:
            raise CheckpointError(f"{self.folder}: the checkpoint lacks {key}.")
        return self.folder / info.relative_path, info

    def read_tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor, converted to ``dtype``; by default as it is stored.

        Raises:
            CheckpointError: it is missing or incomplete.
        """
        self.boxes(key)  # before memory is taken for them
        whole = tuple(self._tensor(key).size)
        tensor = torch.empty(whole, dtype=dtype or self._tensor(key).properties.dtype)
        self.read_into([Shard(key, tensor, (0,) * len(whole), whole, whole)])
        return tensor

    def dtype(self, key: str) -> torch.dtype:
        """What a tensor is stored in.

        Raises:
            CheckpointError: it is missing.
        """
        return self._tensor(key).properties.dtype

    def read_into(self, shards: Sequence[Shard]) -> None:
        """Fill tensors with what the checkpoint has at their places, converted to their dtypes if those have a point.

        Raises:
            CheckpointError: a tensor is missing, incomplete, or of another shape or kind of number.
        """
        by_key: dict[str, list[Shard]] = {}
        for shard in shards:
            by_key.setdefault(shard.key, []).append(shard)
        wanted = [each for key, local in by_key.items() for each in self._wanted(key, local)]
        wanted.sort(key=lambda each: (each[0].path, each[0].at))
        open_parts = Counter(shard.stand_in for _, takers in wanted for shard, _ in takers)
        with torch.no_grad():
            for shard in shards:
                if shard.padded:  # what the checkpoint may not have
                    shard.tensor.zero_()
            for path, group in itertools.groupby(wanted, key=lambda each: each[0].path):
                with open(path, "rb", buffering=0) as file:
                    for box, takers in group:
                        _fill(file, box, takers)
                        for shard, _ in takers:
                            open_parts[shard.stand_in] -= 1
                            if shard.stand_in is not None and not open_parts[shard.stand_in]:
                                shard.stand_in.put_back()  # at once: all of them together are the model once more

    def _wanted(self, key: str, local: list[Shard]) -> list[tuple[Box, list[tuple[Shard, _Overlap]]]]:
        """The boxes of one tensor that shards touch, with what each shard takes of it."""
        entry, padded, whole = self._tensor(key), local[0].padded, local[0].whole
        size, dtype = tuple(entry.size), entry.properties.dtype
        if len(size) != len(whole) or size[padded:] != whole[padded:]:  # a vocabulary's padding is of the first axis
            raise CheckpointError(f"{self.folder}: {key} has shape {list(size)}, but the model needs {list(whole)}.")
        other = next((shard.tensor.dtype for shard in local if shard.tensor.dtype != dtype), dtype)
        if other != dtype and not (other.is_floating_point and dtype.is_floating_point):
            raise CheckpointError(f"{self.folder}: {key} is {dtype}, but the model needs {other}.")
        boxes = self.boxes(key)
        overlaps = [[_overlap(shard, box) for box in boxes] for shard in local]
        for shard, parts in zip(local, overlaps, strict=True):
            held = [(o, max(o, min(o + n, w))) for o, n, w in zip(shard.offsets, shard.sizes, size, strict=True)]
            self._check_whole(key, [part for part in parts if part is not None], held)
        takers = [
            [(shard, part) for shard, part in zip(local, parts, strict=True) if part is not None]
            for parts in zip(*overlaps, strict=True)
        ]
        return [(box, its) for box, its in zip(boxes, takers, strict=True) if its]

    def _check_whole(self, key: str, parts: list[_Overlap], whole: _Overlap) -> None:
        """Refuse parts of a tensor that leave something out of a box of it, or hold something twice.

        Parts that make up a box have the box's corners and no others: at any other place as many begin as end. So
        each one's corners are counted, those with an odd number of ends against those with an even one.
        """
        counts: Counter[Shape] = Counter()
        for count, ends in [(-1, whole), *((1, part) for part in parts)]:
            for number, corner in enumerate(itertools.product(*ends)):
                counts[corner] += -count if number.bit_count() % 2 else count
        fault = min((corner for corner, count in counts.items() if count), default=None)
        if fault is not None:
            raise CheckpointError(
                f"{self.folder}: {key} is incomplete: near {list(fault)}, a part is missing or two parts overlap."
            )

    def matrix(self, key: str, layer: int | None, expert: int | None) -> Matrix:
        """One layer's and expert's matrix of a tensor (a vector is a matrix of one column).

        Args:
            key: The tensor; layers are stacked on its first axis and experts on the next.
            layer: None where layers are not stacked.
            expert: None where experts are not.

        Raises:
            CheckpointError: a part of it is missing, or its dtype is not one that weights have.
        """
        entry = self._tensor(key)
        dtype = spelled(entry.properties.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.folder}: {key} is {entry.properties.dtype}, which cannot be exported exactly."
            )
        index = tuple(place for place in (layer, expert) if place is not None)
        if key not in self._tiles:
            self._tiles[key] = _tiles(self.boxes(key), len(index), dtype)
        tiles = self._tiles[key].get(index, [])
        rows, *rest = entry.size[len(index) :]
        columns = math.prod(rest)
        of = "" if layer is None else f" of layer {layer}" + ("" if expert is None else f", expert {expert}")
        parts = [[(t.row, t.row + t.extent.rows), (t.column, t.column + t.columns)] for t in tiles]
        self._check_whole(f"{key}{of}", parts, [(0, rows), (0, columns)])
        return Matrix(dtype, rows, columns * ITEM_BYTES[dtype], tuple(tiles))

    def boxes(self, key: str) -> list[Box]:
        """The boxes a tensor was saved in.

        Raises:
            CheckpointError: the tensor or a box's place is missing, or a box does not lie in the tensor.
        """
        if key not in self._boxes:
            entry = self._tensor(key)
            whole = tuple(entry.size)
            if math.prod(whole) * entry.properties.dtype.itemsize > self._nbytes:
                raise CheckpointError(
                    f"{self.folder}: {key} with shape {list(whole)} needs more bytes than its files have."
                )
            self._boxes[key] = [self._box(key, tuple(box.offsets), tuple(box.sizes)) for box in entry.chunks]
        return self._boxes[key]

    def _box(self, key: str, offsets: Shape, sizes: Shape) -> Box:
        entry = self._tensor(key)
        info = self._storage.get(MetadataIndex(key, torch.Size(offsets)))
        whole = tuple(entry.size)
        if info is None or getattr(info, "transform_descriptors", None) or not len(offsets) == len(sizes) == len(whole):
            raise CheckpointError(f"{self.folder}: .metadata does not say where {key} at {list(offsets)} is.")
        if any(o < 0 or n < 0 or o + n > w for o, n, w in zip(offsets, sizes, whole, strict=True)):
            raise CheckpointError(
                f"{self.folder}: {key} at {list(offsets)} is outside the tensor's shape {list(whole)}."
            )
        path = str(self.folder / info.relative_path)
        return Box(key, entry.properties.dtype, offsets, sizes, path, info.offset, info.length)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"{self.folder}: the checkpoint lacks {key}.")
        return entry


def _size_of(folder: Path, name: str) -> int:
    """Bytes of a file that ``.metadata`` names; a file outside the folder is not even looked at."""
    with contextlib.suppress(OSError, ValueError):
        found = os.lstat(folder / name)
        if Path(name).name == name and stat.S_ISREG(found.st_mode):
            return found.st_size
    raise CheckpointError(
        f"{folder / '.metadata'}: refused, because it names {name[:100]!r}, which is not a file of the checkpoint."
    )


def _tiles(boxes: list[Box], stacked: int, dtype: str) -> dict[Shape, list[Tile]]:
    """Every box as tiles of the layers and experts it crosses."""
    found: dict[Shape, list[Tile]] = {}
    for box in boxes:
        if not math.prod(box.sizes):
            continue
        rows, columns = box.sizes[stacked], math.prod(box.sizes[stacked + 1 :])
        row, column = box.offsets[stacked], (*box.offsets[stacked + 1 :], 0)[0]
        extent = Extent(box.path, box.start, dtype, math.prod(box.sizes) // columns, columns * ITEM_BYTES[dtype])
        for number, steps in enumerate(np.ndindex(*box.sizes[:stacked])):
            index = tuple(start + step for start, step in zip(box.offsets, steps, strict=False))
            found.setdefault(index, []).append(Tile(row, column, columns, extent.slice(number * rows, rows)))
    return found


def _fill(file: BinaryIO, box: Box, takers: list[tuple[Shard, _Overlap]]) -> None:
    """Read what is wanted of one box, once, into every shard that takes a part."""
    start = box.start  # before anything is allocated for it
    spans = [box.span(overlap) for _, overlap in takers]
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    only, whole = takers[0][0].tensor, math.prod(takers[0][0].sizes)
    direct = len(takers) == 1 and last - first == whole == math.prod(e - s for s, e in takers[0][1])
    if direct and only.device.type == "cpu" and only.dtype == box.dtype and only.is_contiguous():
        _read(file, start + first * box.dtype.itemsize, only)
        return
    stored = torch.empty(last - first, dtype=box.dtype)
    _read(file, start + first * box.dtype.itemsize, stored)
    for (shard, overlap), (begin, _) in zip(takers, spans, strict=True):
        part = stored.as_strided([e - s for s, e in overlap], box.strides, begin - first)
        window = tuple(slice(s - o, e - o) for (s, e), o in zip(overlap, shard.offsets, strict=True))
        shard.tensor.view(shard.sizes)[window].copy_(part)


def _read(file: BinaryIO, offset: int, out: Tensor) -> None:
    read_through_cache(file, offset, memoryview(out.detach().view(-1).view(torch.uint8).numpy()))


def _overlap(shard: Shard, box: Box) -> _Overlap | None:
    """Where a shard and a stored box meet; None where they do not."""
    found = []
    for a, n, b, m in zip(shard.offsets, shard.sizes, box.offsets, box.sizes, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        found.append((start, end))
    return found
