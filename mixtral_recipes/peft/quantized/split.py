"""Which part of a matrix a tensor-parallel rank holds, told by the statistics of its blocks.

Double quantisation scales the blocks' scales by statistics of the whole matrix. Ranks that share a matrix gather its
scales, 1/64 of it, so that each keeps the very bytes a single process has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# Weights quantised or dequantised at once: what is fp32 on the way stays small beside the matrix.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Split:
    """How ranks cut a matrix.

    Attributes:
        axis: 0 for a column-parallel layer, 1 for a row-parallel one.
        size: Ranks that share it.
        rank: Which of them this is.
        halves: Matrices stacked on axis 0, each cut by itself: 2 for a gated ``linear_fc1``.
        group: Those ranks; None for a single one.
    """

    axis: int = 0
    size: int = 1
    rank: int = 0
    halves: int = 1
    group: ProcessGroup | None = None

    def gathered(self, mine: Tensor) -> Tensor:
        """The whole of something that is cut as the matrix is; all ranks of the group call it together.

        Args:
            mine: [rows, columns or blocks of them] of this rank.
        """
        if self.size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(parts, mine.contiguous(), group=self.group)
        if self.axis == 1:
            return torch.cat(parts, dim=1)
        return torch.cat([part.unflatten(0, (self.halves, -1)) for part in parts], dim=1).flatten(0, 1)

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of something that is cut as the matrix is; the inverse of `gathered`."""
        if self.size == 1:
            return whole
        if self.axis == 1:
            return whole.chunk(self.size, dim=1)[self.rank].contiguous()
        return whole.unflatten(0, (self.halves, -1)).chunk(self.size, dim=1)[self.rank].flatten(0, 1)

    def place(self, rows: int, columns: int) -> tuple[int, int, int, int, int]:
        """The arithmetic of `mine`, for a kernel.

        Args:
            rows: Of this rank's part.
            columns: Likewise.

        Returns:
            Rows of a half, here and in the whole; the first row here; columns of the whole; the first column here.
        """
        here, across = rows // self.halves, self.size if self.axis == 1 else 1
        down = self.size if self.axis == 0 else 1
        return (
            here,
            here * down,
            here * self.rank if self.axis == 0 else 0,
            columns * across,
            columns * self.rank if self.axis == 1 else 0,
        )


WHOLE = Split()


def row_blocks(rows: int, columns: int) -> list[slice]:
    """A matrix's rows, some at a time."""
    step = max(_AT_ONCE // columns, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
