"""Tensors as safetensors and torch themselves read them: a model's, for `verify` to compare with, and an adapter's.

Import finds each tensor's place in a file on its own. Were that wrong, reading the source again in the same way would
only repeat it; so a comparison reads the source by the libraries that own the formats. Files are mapped, not loaded:
only the rows that are asked for are copied.
"""

from pathlib import Path

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.rows import spelled
from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.importers.hf.safetensors import StoredTensor


class LibraryRows:
    """A tensor a library gave, [rows, width], as `stream.Rows`."""

    def __init__(self, tensor: Tensor) -> None:
        dtype = spelled(tensor.dtype)
        assert dtype is not None  # the file was read by our own readers before, which refuse all others
        self._tensor, self.dtype = tensor, dtype
        self.rows, self.row_bytes = tensor.shape[0], tensor.shape[1] * tensor.element_size()

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        piece = self._tensor[start : start + count].contiguous().view(torch.uint8)
        out[: count * self.row_bytes] = memoryview(piece.numpy()).cast("B")

    def slice(self, start: int, rows: int) -> "LibraryRows":
        """``rows`` rows from row ``start`` on, as a tensor of their own."""
        return LibraryRows(self._tensor[start : start + rows])


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors or .bin file that `safetensors.read_header` or `pickle.read_tensors` took.

    Raises:
        CheckpointError: the library cannot read it.
    """
    return {name: _stored(tensor) for name, tensor in load(path).items()}


def load(path: Path) -> dict[str, Tensor]:
    """As `read_tensors`, as tensors."""
    try:
        if path.suffix == ".safetensors":
            return _by_safetensors(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # libraries raise many kinds for a file that changed meanwhile
        raise CheckpointError(f"{path}: cannot be read ({in_short(error)}).") from error


def _by_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary


def _stored(tensor: Tensor) -> StoredTensor:
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    return StoredTensor(tuple(tensor.shape), LibraryRows(tensor.detach().reshape(-1, width)))
