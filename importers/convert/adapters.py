"""Adapters merged into their base while a model is exported, row by row: no model, no second copy.

An adapter checkpoint records its base (`checkpoints/lineage`) and its scheme; its tensors are named after the layer
they adapt (`peft/names.py`), which the mapping has in a column of its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, Rows, read_as, read_rows, row_bytes_as, too_large
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.peft.lengths import lengths_of, stretch


@dataclass(frozen=True)
class MergedRows:
    """A base matrix with an adapter added: ``W + scale * B A``, and for DoRA its rows brought to learned lengths.

    Attributes:
        base: The matrix W.
        lora_a: [dim, columns], float32.
        lora_b: [rows, dim], float32.
        scale: alpha / dim.
        magnitude: [rows], float32, the length of each row under DoRA; None for LoRA.
        name: The adapted layer, for errors.
        to: What the sum is rounded to, once; None is the base's type.
    """

    base: Rows
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    magnitude: Tensor | None = None
    name: str = ""
    to: str | None = None

    @property
    def dtype(self) -> str:
        return self.to or self.base.dtype

    @property
    def rows(self) -> int:
        return self.base.rows

    @property
    def row_bytes(self) -> int:
        return row_bytes_as(self.base, self.dtype)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with merged rows, added in float32 and rounded once.

        Raises:
            CheckpointError: one is finite, and too large for the type.
        """
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        rows = torch.frombuffer(read_as(self.base, start, count, "F32"), dtype=torch.float32).view(count, -1)
        mine = slice(start, start + count)
        rows = torch.addmm(rows, self.lora_b[mine], self.lora_a, alpha=self.scale)
        if self.magnitude is not None:
            rows = rows * stretch(self.magnitude[mine], lengths_of(rows)).unsqueeze(1)
        target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes]
        rounded = rows.to(dtype)
        if self.dtype == "F16" and rows.isfinite().all() and not rounded.isfinite().all():
            raise CheckpointError(f"{self.name} with its adapter: {too_large(rows, self.dtype)}")
        target[:] = rounded.contiguous().view(torch.uint8).flatten().numpy()


@dataclass(frozen=True)
class CastRows:
    """A matrix that was trained whole, in the type its base has or another that is wanted.

    Attributes:
        trained: The matrix.
        dtype: That type, as safetensors spells it.
    """

    trained: Rows
    dtype: str

    @property
    def rows(self) -> int:
        return self.trained.rows

    @property
    def row_bytes(self) -> int:
        return row_bytes_as(self.trained, self.dtype)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows, rounded to the type; what is too large for it, the writer refuses."""
        read_rows(self.trained, start, count, out[: count * self.row_bytes], self.dtype)
