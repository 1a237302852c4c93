"""pytorch_model.bin, read without running anything in it: only where each tensor lies is taken from the pickle."""

import pickle
import zipfile
from pathlib import Path

from mixtral_recipes.checkpoints.format.stream import ITEM_BYTES, TORCH_NAMES
from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.importers.hf.safetensors import StoredTensor, stored
from mixtral_recipes.system.pointers import refuse_pointer

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one .bin file. ``weights_only`` loading refuses pickles that carry code.

    Raises:
        CheckpointError: the file carries code, is truncated, or is of the format before PyTorch 1.6.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    refuse_pointer(path, CheckpointError)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: truncated, or saved before PyTorch 1.6; copy it again, or save it as safetensors."
        )
    try:
        with FakeTensorMode():  # no data is read; storages say where theirs is
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, its pickle holds more than tensors and could run code when loaded; "
            "use the model's safetensors files."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read ({in_short(error)}).") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds {type(loaded).__name__}, not a dictionary of tensors.")
    return {name: _locate(path, name, tensor) for name, tensor in loaded.items()}


def _locate(path: Path, name: str, tensor: object) -> StoredTensor:
    import torch

    spelled = {getattr(torch, torch_name): dtype for dtype, torch_name in TORCH_NAMES.items()}
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in spelled:
        raise CheckpointError(f"{path}: {name} is not a tensor of {', '.join(TORCH_NAMES.values())}.")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: {name} is stored transposed or strided; save it contiguous.")
    dtype = spelled[tensor.dtype]
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise CheckpointError(f"{path}: {name} does not say where its data is; save the model as safetensors.")
    return stored(path, start + int(tensor.storage_offset()) * ITEM_BYTES[dtype], dtype, tuple(tensor.shape))
