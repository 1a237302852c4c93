"""Read a checkpoint's ``.metadata`` without running anything in it.

It is a pickle, and unpickling calls whatever the file names. Here it may name the few classes a torch_dist checkpoint
is described with, by their exact names, and nothing else. What stands inside the weight files is read by
``torch.load(weights_only=True)``, torch's own restricted unpickler.
"""

import io
import pickle
from pathlib import Path
from typing import Any

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
        CheckpointError: it is missing, damaged, or names anything a checkpoint has no use for.
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
