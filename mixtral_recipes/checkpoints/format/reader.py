"""Read a torch_dist folder straight into a rank's tensors, whatever layout wrote it.

Nothing in it is run: ``.metadata`` goes through `restricted_pickle`, the rest through
``torch.load(weights_only=True)``. No rank waits for another.
"""

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.checkpoints.fp8 import put_all_back
from mixtral_recipes.checkpoints.shards import Shard, zero_padding
from mixtral_recipes.errors import CheckpointError

Overlap = list[tuple[int, int]]  # per axis (start, end) in the whole tensor


@dataclass
class _Piece:
    """One stored box, and this rank's shards that take something from it."""

    key: str
    box: ChunkStorageMetadata
    storage: _StorageInfo
    shards: list[Shard] = field(default_factory=list)


class StoredWeights:
    """A torch_dist folder, opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Read what lies where.

        Raises:
            CheckpointError: ``.metadata`` is missing, damaged, or points outside the folder.
        """
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._storage: dict[MetadataIndex, _StorageInfo] = dict(self._metadata.storage_data or {})
        for info in self._storage.values():
            name = str(info.relative_path)
            if Path(name).name != name or name in ("", ".", "..") or (folder / name).is_symlink():
                raise CheckpointError(
                    f"{folder / '.metadata'}: refused, it points at {name!r}, outside the checkpoint."
                )

    def __contains__(self, key: str) -> bool:
        return key in self._metadata.state_dict_metadata

    def read_object(self, key: str) -> Any:
        """An object saved under a key: plain values and tensors.

        Raises:
            CheckpointError: it is not there, damaged, or more than plain data.
        """
        info = self._storage.get(MetadataIndex(key))
        if info is None:
            raise CheckpointError(f"{self.folder}: the checkpoint lacks {key}.")
        with (self.folder / info.relative_path).open("rb") as file:
            return self._load(file, info, key)

    def read_into(self, shards: list[Shard]) -> None:
        """Fill tensors with what the checkpoint has at their places, converted to their dtypes.

        Raises:
            CheckpointError: a tensor is missing, incomplete or of another shape.
        """
        zero_padding(shards)
        by_key: dict[str, list[Shard]] = {}
        for shard in shards:
            by_key.setdefault(shard.key, []).append(shard)
        pieces = [piece for key, local in by_key.items() for piece in self._pieces(key, local)]
        for name in sorted({str(piece.storage.relative_path) for piece in pieces}):
            with (self.folder / name).open("rb") as file:
                mine = [piece for piece in pieces if str(piece.storage.relative_path) == name]
                for piece in sorted(mine, key=lambda piece: piece.storage.offset):
                    self._fill(file, piece)
        put_all_back(shard.stand_in for shard in shards)

    def _pieces(self, key: str, local: list[Shard]) -> list[_Piece]:
        """The stored boxes of one tensor that this rank's shards touch."""
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: the checkpoint lacks {key}.")
        padded, whole = local[0].padded, local[0].whole
        if len(entry.size) != len(whole) or (not padded and tuple(entry.size) != whole):
            raise CheckpointError(f"{self.folder}: {key} has shape {list(entry.size)}, the model's is {list(whole)}.")
        found: list[_Piece] = []
        covered = dict.fromkeys(range(len(local)), 0)
        for box in entry.chunks:
            piece = _Piece(key, box, self._storage[MetadataIndex(key, box.offsets)])
            for number, shard in enumerate(local):
                overlap = _overlap(shard, box)
                if overlap is not None:
                    piece.shards.append(shard)
                    covered[number] += math.prod(end - start for start, end in overlap)
            found += [piece] if piece.shards else []
        for number, shard in enumerate(local):
            if covered[number] < shard.tensor.numel() and not padded:
                raise CheckpointError(
                    f"{self.folder}: {key} is incomplete: {covered[number]} of {shard.tensor.numel()} elements."
                )
        return found

    def _fill(self, file: BinaryIO, piece: _Piece) -> None:
        """Read one stored box, once, into every shard it touches."""
        stored = self._load(file, piece.storage, piece.key)
        if not isinstance(stored, Tensor) or stored.shape != piece.box.sizes:
            raise CheckpointError(f"{file.name}: {piece.key} is not the tensor .metadata describes.")
        for shard in piece.shards:
            overlap = _overlap(shard, piece.box)
            assert overlap is not None
            target = shard.tensor.view(shard.sizes)[_window(overlap, shard.offsets)]
            with torch.no_grad():
                target.copy_(stored[_window(overlap, tuple(piece.box.offsets))])

    def _load(self, file: BinaryIO, info: _StorageInfo, key: str) -> Any:
        file.seek(info.offset)
        try:
            return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged or hostile bytes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{file.name}: {key} cannot be read ({reason}).") from error


def _overlap(shard: Shard, box: ChunkStorageMetadata) -> Overlap | None:
    """Where a shard and a stored box meet; None where they do not."""
    found = []
    for a, n, b, m in zip(shard.offsets, shard.sizes, box.offsets, box.sizes, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        found.append((start, end))
    return found


def _window(overlap: Overlap, offsets: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start - o, end - o) for (start, end), o in zip(overlap, offsets, strict=True))
