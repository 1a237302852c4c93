"""Write a Megatron torch_dist checkpoint without a model: a SavePlanner that knows the source, a writer that streams.

torch.distributed.checkpoint plans, shares the items out over processes and writes ``.metadata``; these two classes are
its extension points. What comes out is the standard format: each item is what ``torch.save`` would have written.
"""

import io
import itertools
import math
import pickle
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # the entry FileSystemReader expects; there is no public spelling
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from mixtral_recipes.checkpoints.format.stream import (
    ALIGNMENT,
    ITEM_BYTES,
    TORCH_NAMES,
    Extent,
    Part,
    Record,
    Run,
    Stream,
    lay_out,
    read_rows,
)
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import (
    WEIGHTS,
    Block,
    Dims,
    Weight,
    disk_shape,
    instances,
    merge_blocks,
)

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


def chunks_of(dims: Dims, dtypes: dict[str, str]) -> list[Chunk]:
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
    return chunks


def share(chunks: list[Chunk], count: int) -> list[list[Chunk]]:
    """Deal chunks out so that every share has about the same bytes; the same answer in every process."""
    shares: list[list[Chunk]] = [[] for _ in range(count)]
    filled = [0] * count
    for chunk in sorted(chunks, key=lambda chunk: -chunk.nbytes):
        least = filled.index(min(filled))
        shares[least].append(chunk)
        filled[least] += chunk.nbytes
    return shares


def _extra_state_names(weight: Weight, dims: Dims) -> list[str]:
    """Unique names of a module's states, as Megatron's ShardedObject spells them."""
    key = weight.disk.removesuffix("weight") + "_extra_state"
    shape = [dims.num_layers] * weight.per_layer + [dims.num_moe_experts] * weight.per_expert or [1]
    return [
        f"{key}/shard_{'.'.join(map(str, where))}_{'.'.join(map(str, shape))}"
        for where in itertools.product(*map(range, shape))
    ]


def object_bytes(dims: Dims) -> dict[str, bytes]:
    """The items that are not tensors: an empty common state, and "no FP8" for every module that keeps a state."""
    found = {COMMON_STATE: _saved([{}])}
    empty = _saved([torch.empty(0, dtype=torch.uint8)])
    for weight in WEIGHTS:
        if weight.extra_state:
            found |= dict.fromkeys(_extra_state_names(weight, dims), empty)
    return found


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class ConversionPlanner(SavePlanner):
    """Plans the items of an import; ``resolve_data`` makes each one only when it is asked for."""

    def __init__(self, tensors: dict[str, Extent], chunks: list[Chunk], objects: dict[str, bytes]) -> None:
        """Take this process's chunks and objects; ``tensors`` says where the canonical rows are."""
        self._tensors = tensors
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """There is no state dict: the plan follows from the source."""

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(objects + [_write_item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise CheckpointError(f"{key}: the items to write do not add up to {list(entry.size)}.")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The whole item in memory; for torch's own writer. Ours streams `record_of` instead."""
        record = self.record_of(write_item)
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(record.prefix)
        data = torch.empty(record.nbytes, dtype=torch.uint8)
        view = memoryview(data.numpy())
        for part in record.parts:
            count = part.stop - part.start
            width = part.source.row_bytes * ITEM_BYTES[record.dtype] // ITEM_BYTES[part.source.dtype]
            read_rows(part.source, part.start, count, view[: count * width], record.dtype)
            view = view[count * width :]
        chunk = self._chunk(write_item)
        return data.view(getattr(torch, TORCH_NAMES[chunk.dtype])).view(chunk.sizes)

    def record_of(self, write_item: WriteItem) -> Record:
        """How to write an item."""
        if write_item.type == WriteItemType.BYTE_IO:
            return Record(prefix=self._objects[write_item.index.fqn])
        chunk = self._chunk(write_item)
        prefix, suffix = torch_save_frame(chunk.dtype, chunk.sizes)
        parts = [Part(block.name, self._tensors[block.name], block.start, block.stop) for block in chunk.blocks]
        return Record(prefix, parts, suffix, chunk.dtype, chunk.nbytes, ALIGNMENT)

    def _chunk(self, write_item: WriteItem) -> Chunk:
        return self._chunks[write_item.index.fqn, tuple(write_item.index.offset or ())]


def _write_item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    return WriteItem(
        MetadataIndex(chunk.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)),
            TensorProperties(dtype=getattr(torch, TORCH_NAMES[chunk.dtype])),
            torch.Size(chunk.size),
        ),
    )


class StreamingWriter(StorageWriter):
    """Writes a plan's items as they are read from the source, and hashes the files as it goes.

    Attributes:
        hashes: File name -> (length, SHA-256) of its pieces, of the files this process wrote.
    """

    def __init__(self, folder: Path, stream: Stream) -> None:
        self._folder = folder
        self._stream = stream
        self.hashes: dict[str, list[tuple[int, str]]] = {}

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        source = cast(ConversionPlanner, planner)
        items = sorted(((source.record_of(item), item) for item in plan.items), key=lambda pair: -pair[0].length)
        files: list[list[tuple[Record, WriteItem]]] = [[] for _ in range(self._stream.threads)]
        filled = [0] * len(files)
        for record, item in items:
            least = filled.index(min(filled))
            files[least].append((record, item))
            filled[least] += record.length
        runs = []
        for index, content in enumerate(file for file in files if file):
            records = [record for record, _ in content]
            lay_out(records)
            runs.append(Run(self._folder / f"__{plan.storage_data}_{index}.distcp", records))
        self._stream.write(runs)
        self.hashes = {run.path.name: run.hashes for run in runs}
        results = [
            WriteResult(item.index, record.length, _StorageInfo(run.path.name, record.offset, record.length))
            for run, content in zip(runs, (file for file in files if file), strict=True)
            for record, item in content
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = StorageMeta(save_id=str(uuid.uuid4()))  # no path: the folder will be renamed
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


_frames: dict[tuple[str, tuple[int, ...]], tuple[bytes, bytes]] = {}


def torch_save_frame(dtype: str, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the data of a contiguous tensor of this dtype and shape."""
    if (dtype, sizes) not in _frames:
        tensor = torch.empty(sizes, dtype=getattr(torch, TORCH_NAMES[dtype]))  # never touched, so never resident
        recorder = _Recorder()
        with torch.serialization.skip_data():
            torch.save(tensor, cast(Any, recorder))
        nbytes = math.prod(sizes) * ITEM_BYTES[dtype]
        _frames[dtype, sizes] = recorder.around(nbytes)
    return _frames[dtype, sizes]


class _Recorder(io.RawIOBase):
    """A file that keeps what is written and where, and lets torch.save skip over the tensor's data."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset if whence == 0 else self._position + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def around(self, nbytes: int) -> tuple[bytes, bytes]:
        """The bytes before and after the one hole, which must be of ``nbytes``."""
        sides: list[list[bytes]] = [[]]
        end = 0
        for position, data in self._pieces:
            if position != end:
                sides.append([])
                end += nbytes
            if position != end:
                break
            sides[-1].append(data)
            end += len(data)
        if end != self._position or len(sides) != 1 + (nbytes > 0):
            raise RuntimeError("torch.save lays its file out in another way than the one known here")
        return b"".join(sides[0]), b"".join(b"".join(side) for side in sides[1:])
