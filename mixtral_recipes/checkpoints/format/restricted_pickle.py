"""Read the pickles of a checkpoint without running anything in them.

Unpickling calls whatever the file names. Here ``.metadata`` may name the few classes a torch_dist checkpoint is
described with, by their exact names, and a tensor's description only what ``torch.save`` writes for one plain tensor.
Objects are read by ``torch.load(weights_only=True)``, torch's own restricted unpickler.
"""

import functools
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mixtral_recipes.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = frozenset(
    {
        *((_METADATA, name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # Checkpoints that Megatron wrote itself.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("builtins", "set"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13's spelling
    }
)  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        # A dtype is pickled by its name. A dotted name would walk into other modules.
        found = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(found, torch.dtype):
            return found
        raise CheckpointError(f"names {module}.{name}, which no checkpoint needs")


def read_metadata(weights: Path) -> Metadata:
    """The ``.metadata`` of a torch_dist folder.

    Args:
        weights: The folder of ``.metadata`` and the ``.distcp`` files.

    Raises:
        CheckpointError: it is missing, damaged, or names anything a checkpoint does not need.
    """
    path = weights / ".metadata"
    try:
        return metadata_from(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {weights} is not a finished torch_dist checkpoint.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused, it {error}.") from error


def metadata_from(content: bytes) -> Metadata:
    """Unpickle the bytes of a ``.metadata``.

    Raises:
        CheckpointError: as `read_metadata`; the text goes on after "it".
    """
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"cannot be unpickled ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"holds {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


class Described(NamedTuple):
    """What a pickle says of a tensor.

    Attributes:
        record: Name of the record of its archive that holds the elements.
        dtype: Of the elements.
        offset: Elements of the record before the first.
        shape: The tensor's; its elements lie in order.
    """

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Takes ``torch.save``'s description of a tensor for what it says, and makes no tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return functools.partial(_describe)  # not itself: a pickle can set attributes of what it is given
        if (module, name) == ("collections", "OrderedDict"):  # the tensor's hooks, none
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" and "." not in name else None
        dtype = getattr(found, "_dtype", None) if isinstance(found, type) else None
        if isinstance(dtype, torch.dtype):  # torch.FloatStorage and its like
            return dtype
        raise CheckpointError(f"names {module}.{name}, which no plain tensor needs")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, record, _, _ = pid
        if kind != "storage" or not isinstance(record, str) or not isinstance(dtype, torch.dtype):
            raise CheckpointError("names a storage that is none")
        return record, dtype


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Described:
    record, dtype = storage
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
        raise CheckpointError("describes a tensor whose sizes are no sizes")
    step = 1
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and actual != step:
            raise CheckpointError("describes a transposed or strided tensor")
        step *= size
    return Described(record, dtype, offset, tuple(shape))


def described_tensor(content: bytes) -> Described:
    """Read the pickle in ``torch.save``'s archive of one tensor.

    Raises:
        CheckpointError: it describes anything else; the text says what it does.
    """
    try:
        described = _TensorUnpickler(io.BytesIO(content)).load()
    except CheckpointError as error:
        raise CheckpointError(f"its pickle {error}") from error
    if not isinstance(described, Described):
        raise CheckpointError("its pickle describes no tensor")
    return described
