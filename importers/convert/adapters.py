"""Adapters merged into their base while a model is exported, row by row: no model, no second copy.

An adapter checkpoint records its base (`checkpoints/lineage`) and its scheme; its tensors are named after the layer
they adapt (`peft/names.py`), which the mapping has in a column of its own.
"""

import numpy as np
import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.rows import Rows, read_rows, read_tensor, row_bytes_as, too_large, torch_dtype
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.peft.lengths import lengths_of, stretch


class MergedRows:
    """A base matrix with an adapter added: ``W + scale * B A``, and for DoRA its rows brought to learned lengths.

    Args:
        base: The matrix W.
        lora_a: [dim, columns], float32.
        lora_b: [rows, dim], float32.
        scale: alpha / dim.
        magnitude: [rows], float32, the length of each row under DoRA; None for LoRA.
        name: The adapted layer, for errors.
        to: What the sum is rounded to, once; None is the base's type.
    """

    def __init__(
        self,
        base: Rows,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        magnitude: Tensor | None = None,
        name: str = "",
        to: str | None = None,
    ) -> None:
        self._base, self._a, self._b, self._scale = base, lora_a, lora_b, scale
        self._magnitude, self._name = magnitude, name
        self.dtype, self.rows = to or base.dtype, base.rows
        self.row_bytes = row_bytes_as(base, self.dtype)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with merged rows, added in float32 and rounded once.

        Raises:
            CheckpointError: one is finite, and too large for the type.
        """
        dtype = torch_dtype(self.dtype)
        rows = read_tensor(self._base, start, count, "F32")
        mine = slice(start, start + count)
        rows = torch.addmm(rows, self._b[mine], self._a, alpha=self._scale)
        if self._magnitude is not None:
            rows = rows * stretch(self._magnitude[mine], lengths_of(rows)).unsqueeze(1)
        target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes]
        rounded = rows.to(dtype)
        if self.dtype == "F16" and rows.isfinite().all() and not rounded.isfinite().all():
            raise CheckpointError(f"{self._name} with its adapter: {too_large(rows, self.dtype)}")
        target[:] = rounded.contiguous().view(torch.uint8).flatten().numpy()


class CastRows:
    """A matrix that was trained whole, in the type its base has or another that is wanted.

    Args:
        trained: The matrix.
        dtype: That type, as safetensors spells it.
    """

    def __init__(self, trained: Rows, dtype: str) -> None:
        self._trained, self.dtype = trained, dtype
        self.rows, self.row_bytes = trained.rows, row_bytes_as(trained, dtype)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows, rounded to the type; what is too large for it, the writer refuses."""
        read_rows(self._trained, start, count, out[: count * self.row_bytes], self.dtype)
