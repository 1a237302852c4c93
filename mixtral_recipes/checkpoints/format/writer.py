"""Write the files of a torch_dist folder: ``.distcp`` files, and the ``.metadata`` that says what lies where.

The layout is torch.distributed.checkpoint's, which Megatron and torch read: every tensor item is what ``torch.save``
would have written. Training writes tensors it has in memory, import rows it reads from other files; both go through
`stream`, which hashes what it writes, so that the manifest costs no second pass.
"""

import copyreg
import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mixtral_recipes.checkpoints.format.archive import frame
from mixtral_recipes.checkpoints.format.manifest import Pieces
from mixtral_recipes.checkpoints.format.rows import TensorRows, torch_dtype
from mixtral_recipes.checkpoints.format.shard import Shape, Shard
from mixtral_recipes.checkpoints.format.stream import ALIGNMENT, Part, Record, Run, Stream, lay_out


@dataclass(frozen=True)
class Item:
    """One entry of a file: a tensor's box, or an object where ``whole`` is None."""

    key: str
    offsets: Shape = ()
    sizes: Shape = ()
    whole: Shape | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class WrittenFile:
    """What one process wrote of a checkpoint.

    Attributes:
        name: The file's.
        pieces: Its hashes.
        items: Every item, its first byte and its length.
    """

    name: str
    pieces: Pieces
    items: list[tuple[Item, int, int]]


def torch_bytes(value: Any) -> bytes:
    """What ``torch.save`` writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def object_item(key: str, content: bytes) -> tuple[Item, Record]:
    """An object to write; ``content`` is what ``torch.save`` wrote for it."""
    return Item(key), Record(prefix=content)


def shard_item(shard: Shard) -> tuple[Item, Record]:
    """A tensor in memory to write; as it is when it is written."""
    rows = TensorRows(shard.tensor)
    prefix, suffix = frame(shard.tensor.dtype, shard.sizes)
    record = Record(prefix, [Part(None, rows, 0, rows.rows)], suffix, rows.dtype, shard.nbytes, ALIGNMENT)
    return Item(shard.key, shard.offsets, shard.sizes, shard.whole, shard.tensor.dtype), record


def rows_item(
    key: str, dtype: str, offsets: Shape, sizes: Shape, whole: Shape, parts: Sequence[Part]
) -> tuple[Item, Record]:
    """A box to write whose rows are read from elsewhere; ``dtype`` in `stream`'s spelling."""
    kind = torch_dtype(dtype)
    prefix, suffix = frame(kind, sizes)
    record = Record(prefix, parts, suffix, dtype, math.prod(sizes) * kind.itemsize, ALIGNMENT)
    return Item(key, offsets, sizes, whole, kind), record


def dealt[T](things: Iterable[T], count: int, nbytes: Callable[[T], int]) -> list[list[T]]:
    """So many shares of things, about as large as each other; the same ones in every process."""
    shares: list[list[T]] = [[] for _ in range(count)]
    filled = [0] * count
    for thing in sorted(things, key=nbytes, reverse=True):
        least = filled.index(min(filled))
        shares[least].append(thing)
        filled[least] += nbytes(thing)
    return shares


def write_items(
    folder: Path, rank: int, items: Iterable[tuple[Item, Record]], stream: Stream | None = None
) -> list[WrittenFile]:
    """Write one process's share of a checkpoint.

    Args:
        folder: The weights folder.
        rank: Names the files.
        items: What to write.
        stream: Writes as many files at once as it has threads; None writes one.

    Raises:
        CheckpointError: a source is truncated or not finite.
        EnvironmentProblem: the disk is full.
    """
    stream = stream or Stream(1)
    runs = []
    files = dealt(items, stream.threads, lambda pair: pair[1].length)
    for index, content in enumerate(files):
        records = [record for _, record in content]
        lay_out(records)
        if records:
            runs.append(Run(folder / f"__{rank}_{index}.distcp", records))
    stream.write(runs)
    return [
        WrittenFile(run.path.name, run.hashes, [(item, record.offset, record.length) for item, record in content])
        for run, content in zip(runs, files, strict=False)
    ]


def write_file(folder: Path, rank: int, shards: Iterable[Shard], objects: Mapping[str, bytes]) -> WrittenFile:
    """Write one rank's share of a training checkpoint, into one file.

    Args:
        folder: The weights folder.
        rank: Names the file.
        shards: Tensors, on any device.
        objects: Key -> bytes of ``torch.save``.
    """
    items = [object_item(key, content) for key, content in objects.items()]
    (written,) = write_items(folder, rank, items + [shard_item(shard) for shard in shards])
    return written


def write_metadata(folder: Path, files: Iterable[WrittenFile]) -> None:
    """Write ``.metadata`` and Megatron's ``metadata.json`` for files that are all there."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    placed = [(item, _StorageInfo(file.name, start, length)) for file in files for item, start, length in file.items]
    for item, info in sorted(placed, key=lambda pair: (pair[0].key, pair[0].offsets)):
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
        storage[index] = info
    # No path in it: the folder is renamed when it is complete.
    metadata = Metadata(entries, storage_data=storage, storage_meta=StorageMeta())
    metadata.version = "1.0.0"  # of the layout; torch 2.8 has no name for it, and does not mind
    with (folder / ".metadata").open("wb") as file:
        pickler = pickle.Pickler(file)
        pickler.dispatch_table = copyreg.dispatch_table | {TensorProperties: _for_any_torch}
        pickler.dump(metadata)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def _for_any_torch(properties: TensorProperties) -> tuple[Any, ...]:
    """A tensor's properties as torch pickled them before 2.15, which adds strides that older versions cannot read."""
    return copyreg.__newobj__, (TensorProperties,), properties.__getstate__()[:5]  # pyright: ignore[reportAttributeAccessIssue]
