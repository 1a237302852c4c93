"""Rows read in pieces, as the writers of checkpoints do."""

import torch

from mixtral_recipes.checkpoints.format.rows import Rows


def read_in_pieces(rows: Rows, piece: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width], ``piece`` rows at a time."""
    parts = []
    for start in range(0, rows.rows, piece):
        count = min(piece, rows.rows - start)
        out = bytearray(count * rows.row_bytes)
        rows.read(start, count, memoryview(out))
        parts.append(torch.frombuffer(out, dtype=dtype).view(count, -1))
    return torch.cat(parts)
