"""A tensor's rows, wherever they are: read a few at a time, cast and looked at on the way."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mixtral_recipes.checkpoints.format.reading import BUFFER_BYTES, read_exactly

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # safetensors' spelling of the dtypes a weight may have
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MOST_AXES = 8  # that a file may give a tensor; weights have four at most, and some work doubles with each
# Largest magnitude pattern that is finite, plus one: Inf and NaN have every exponent bit set.
_NOT_FINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def torch_dtype(dtype: str) -> "torch.dtype":
    """One of these dtypes as torch has it."""
    import torch

    return getattr(torch, TORCH_NAMES[dtype])


def spelled(dtype: "torch.dtype") -> str | None:
    """How safetensors spells a dtype of torch's; None for one that no weight may have."""
    return next((ours for ours, name in TORCH_NAMES.items() if str(dtype) == f"torch.{name}"), None)


class Rows(Protocol):
    """A two-dimensional tensor that can be read a few rows at a time."""

    @property
    def dtype(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        ...


@dataclass(frozen=True)
class Extent:
    """A tensor stored row after row at one place in a file."""

    path: str
    offset: int
    dtype: str
    rows: int
    row_bytes: int

    def read(self, start: int, count: int, out: memoryview) -> None:
        read_exactly(self.path, self.offset + start * self.row_bytes, out[: count * self.row_bytes])

    def slice(self, start: int, rows: int) -> "Extent":
        """``rows`` rows from row ``start`` on, as a tensor of their own."""
        return Extent(self.path, self.offset + start * self.row_bytes, self.dtype, rows, self.row_bytes)


class TensorRows:
    """A tensor's elements in order, one a row; on any device."""

    def __init__(self, tensor: "Tensor") -> None:
        self._flat = tensor.detach().reshape(-1)
        self.dtype = str(self._flat.dtype)
        self.rows = self._flat.numel()
        self.row_bytes = self._flat.element_size()

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with elements ``start`` to ``start + count``."""
        import torch

        target = torch.frombuffer(out, dtype=self._flat.dtype, count=count)
        target.copy_(self._flat[start : start + count])


class LikeSource:
    """Rows of another tensor, of its type and width and as many, whatever is done to them as they are read."""

    def __init__(self, source: Rows) -> None:
        self._source = source
        self.dtype, self.rows, self.row_bytes = source.dtype, source.rows, source.row_bytes


def read_rows(source: Rows, start: int, count: int, out: memoryview, dtype: str) -> None:
    """Read rows, cast to ``dtype`` on the way."""
    if source.dtype == dtype:
        source.read(start, count, out)
        return
    import torch

    scratch = bytearray(count * source.row_bytes)
    source.read(start, count, memoryview(scratch))
    read = torch.frombuffer(scratch, dtype=torch_dtype(source.dtype))
    np.frombuffer(out, dtype=np.uint8)[:] = read.to(torch_dtype(dtype)).view(torch.uint8).numpy()


def row_bytes_as(source: Rows, dtype: str) -> int:
    """Bytes of a row once cast."""
    if source.dtype == dtype:
        return source.row_bytes
    return source.row_bytes * ITEM_BYTES[dtype] // ITEM_BYTES[source.dtype]


def read_as(source: Rows, start: int, count: int, dtype: str) -> bytearray:
    """As `read_rows`, into memory of their own."""
    out = bytearray(count * row_bytes_as(source, dtype))
    read_rows(source, start, count, memoryview(out), dtype)
    return out


def read_tensor(source: Rows, start: int, count: int, dtype: str) -> "Tensor":
    """As `read_rows`, as a tensor [count, columns]."""
    import torch

    return torch.frombuffer(read_as(source, start, count, dtype), dtype=torch_dtype(dtype)).view(count, -1)


def pieces(rows: Rows, nbytes: int = BUFFER_BYTES) -> list[tuple[int, int]]:
    """(first row, count) of pieces of no more bytes, or of one row, that are all of a tensor."""
    step = max(1, nbytes // rows.row_bytes)
    return [(start, min(step, rows.rows - start)) for start in range(0, rows.rows, step)]


def is_finite(data: memoryview, dtype: str) -> bool:
    """Whether no value is NaN or Inf.

    A float's bits, read as an integer, grow with its magnitude: the largest signed value finds the worst positive
    number, the largest unsigned one the worst negative. Two passes that run at the speed of the cache.
    """
    bits = 8 * ITEM_BYTES[dtype]
    limit = _NOT_FINITE[dtype]
    signed = np.frombuffer(data, dtype=f"i{bits // 8}")
    return not signed.size or bool(
        signed.max() < limit and signed.view(f"u{bits // 8}").max() < limit + (1 << (bits - 1))
    )


def too_large(values: "Tensor", dtype: str) -> str:
    """The message about values that a type is too small for.

    Args:
        values: Finite ones, the too large one among them.
        dtype: The type.
    """
    import torch

    short = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    largest = values.flatten()[values.abs().argmax()].item()
    most = torch.finfo(torch_dtype(dtype)).max
    others = " or ".join(name for key, name in short.items() if key != dtype and key != "F16")
    return f"contains {largest:.5g}, beyond the range of {short[dtype]} ({most:.5g}); use --dtype {others}."
