"""Write the files of a torch_dist folder: each rank's ``.distcp`` file and the ``.metadata`` that says what lies where.

The layout is torch.distributed.checkpoint's, which Megatron and torch read. Writing hashes what it writes, so that the
manifest costs no second pass.
"""

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mixtral_recipes.checkpoints.shards import Shape, Shard


@dataclasses.dataclass(frozen=True)
class Item:
    """One entry of a file: a tensor's box, or an object where ``whole`` is None."""

    key: str
    file: str
    start: int
    length: int
    offsets: Shape = ()
    sizes: Shape = ()
    whole: Shape | None = None
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """What one rank wrote."""

    name: str
    sha256: str
    size: int
    items: list[Item]


class _HashingFile:
    """A file that hashes what is written to it. ``torch.save`` needs no more than ``write``."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        rest = view
        while rest.nbytes:
            rest = rest[os.write(self._descriptor, rest) :]
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None: ...

    def finish(self) -> str:
        """Make it durable; returns the hash of all of it."""
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def close(self) -> None:
        os.close(self._descriptor)


def write_file(folder: Path, rank: int, shards: Iterable[Shard], objects: Mapping[str, bytes]) -> WrittenFile:
    """Write one rank's share of a checkpoint.

    Args:
        folder: The weights folder.
        rank: Names the file.
        shards: What to write; tensors on the CPU.
        objects: Key -> bytes of ``torch.save``.
    """
    name = f"__{rank}_0.distcp"
    file, items = _HashingFile(folder / name), []
    try:
        for key, content in objects.items():
            items.append(Item(key, name, file.position, file.write(content)))
        for shard in shards:
            start = file.position
            # A copy: torch.save writes the whole memory a view belongs to.
            torch.save(shard.tensor.detach().cpu().clone().view(shard.sizes), file)  # pyright: ignore[reportArgumentType]
            length = file.position - start
            items.append(
                Item(shard.key, name, start, length, shard.offsets, shard.sizes, shard.whole, shard.tensor.dtype)
            )
        return WrittenFile(name, file.finish(), file.position, items)
    finally:
        file.close()


def write_metadata(folder: Path, files: Iterable[WrittenFile]) -> None:
    """Write ``.metadata`` and Megatron's ``metadata.json`` for files that are all there."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    items = sorted((item for file in files for item in file.items), key=lambda item: (item.key, item.offsets))
    for item in items:
        if item.whole is None or item.dtype is None:
            entries[item.key] = BytesStorageMetadata()
            index = MetadataIndex(item.key)
        else:
            offsets = torch.Size(item.offsets)
            entry = entries.setdefault(
                item.key, TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(item.whole), [])
            )
            index = MetadataIndex(item.key, offsets, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
        storage[index] = _StorageInfo(item.file, item.start, item.length)
    # No path in it: the folder is renamed when it is complete.
    metadata = Metadata(entries, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
