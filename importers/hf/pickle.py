"""pytorch_model.bin, read without running anything in it: only where each tensor lies is taken from the pickle."""

import zipfile
from pathlib import Path

from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, spelled
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf.safetensors import StoredTensor, stored
from mixtral_recipes.system.pointers import refuse_pointer

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one .bin file; nothing in it is run.

    Raises:
        CheckpointError: the file carries code, is truncated, compressed or big-endian, or is of the format before
            PyTorch 1.6.
    """
    from mixtral_recipes.checkpoints.format.archive import find_tensors

    refuse_pointer(path, CheckpointError)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: truncated, or saved by PyTorch older than 1.6; copy it again, or save it as safetensors."
        )
    try:
        with path.open("rb") as file:
            found = find_tensors(file, path.stat().st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused, {error}; save the model as safetensors.") from error
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in found.items():
        dtype = spelled(tensor.dtype)
        if dtype is None:
            known = ", ".join(TORCH_NAMES.values())
            raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}; only {known} can be converted.")
        tensors[name] = stored(path, tensor.start, dtype, tensor.shape)
    return tensors
