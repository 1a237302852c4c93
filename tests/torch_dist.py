"""torch_dist folders written by torch.distributed.checkpoint itself, in any boxes."""

import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

Place = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def window(offsets: Iterable[int], sizes: Iterable[int]) -> tuple[slice, ...]:
    """What cuts a box out of a whole tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def save_boxes(
    state: dict[str, torch.Tensor],
    places: dict[str, list[Place]],
    folder: Path,
    objects: Mapping[str, Any] | None = None,
) -> None:
    """Save each tensor in the boxes given for it, and objects, the folder being torch's own.

    In the description stand the plans of all ranks too, as Megatron's strategy leaves them there.
    """
    boxes: dict[tuple[str, torch.Size], Any] = {}
    items = []
    for name, value in (objects or {}).items():
        boxes[name, torch.Size(())] = content = io.BytesIO()
        torch.save(value, content)
        items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
    for name, tensor in state.items():
        for offsets, sizes in places[name]:
            part = tensor[window(offsets, sizes)].contiguous()
            boxes[name, torch.Size(offsets)] = part
            data = TensorWriteData(
                ChunkStorageMetadata(torch.Size(offsets), part.shape), TensorProperties(dtype=part.dtype), tensor.shape
            )
            items.append(WriteItem(MetadataIndex(name, torch.Size(offsets)), WriteItemType.SHARD, tensor_data=data))

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan(items)
            return self.plan

        def create_global_plan(self, all_plans):
            return create_default_global_save_plan(all_plans)

        def resolve_data(self, write_item):
            return boxes[write_item.index.fqn, torch.Size(write_item.index.offset or ())]

    save({}, storage_writer=FileSystemWriter(folder), planner=Planner(), no_dist=True)
    described = pickle.loads((folder / ".metadata").read_bytes())
    described.all_local_plans = [SavePlan(items)]
    (folder / ".metadata").write_bytes(pickle.dumps(described))


def halves(shape: tuple[int, ...], axis: int) -> list[Place]:
    """Two boxes, cut along an axis."""
    half = (shape[axis] + 1) // 2
    return [
        (
            tuple(start if index == axis else 0 for index in range(len(shape))),
            tuple(min(half, n - start) if index == axis else n for index, n in enumerate(shape)),
        )
        for start in (0, half)
    ]
