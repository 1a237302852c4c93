"""Tensors of other formats seen as canonical ones: the same numbers in another order, read a few rows at a time.

Each is a `stream.Rows`, so import, export and verify read through it as they read a file.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, LikeSource, Rows

_BAND_BYTES = 64 << 20  # of a transposed matrix held in memory per thread
_PIECE_BYTES = 4 << 20
_NO_BAND = (0, np.empty((0, 0), dtype=np.uint8))


class RowRanges:
    """Stretches of the rows of one tensor, or of several of one type and width, as a tensor of their own.

    Args:
        ranges: (tensor, first row, row after the last) of each stretch, one below the other.
    """

    def __init__(self, ranges: Sequence[tuple[Rows, int, int]]) -> None:
        self._ranges = ranges
        self.dtype, self.row_bytes = ranges[0][0].dtype, ranges[0][0].row_bytes
        self.rows = sum(stop - start for _, start, stop in ranges)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        at = 0
        for source, first, last in self._ranges:
            low, high = max(start, at), min(start + count, at + last - first)
            if low < high:
                source.read(first + low - at, high - low, out[(low - start) * self.row_bytes :])
            at += last - first


class TurnedHeads(LikeSource):
    """A query or key weight with the rows of its heads in the other of two orders.

    transformers and Megatron turn rows i and i + D/2 of a head by the i-th angle (a head's halves), Mistral's own code
    and llama.cpp rows 2i and 2i + 1 (its pairs). So row i of a head in halves is row 2i of one in pairs, and row
    D/2 + i is row 2i + 1.

    Args:
        source: The weight as stored, [heads x head dim, hidden].
        head_dim: Rows of a head, D.
        stored: The order it is stored in; it is read in the other.

    Source: mistral-inference `rope.py`, apply_rotary_emb; transformers `modeling_mixtral.py`, rotate_half.
    """

    def __init__(self, source: Rows, head_dim: int, stored: Literal["pairs", "halves"] = "pairs") -> None:
        super().__init__(source)
        self._head_dim = head_dim
        self._axes = (head_dim // 2, 2) if stored == "pairs" else (2, head_dim // 2)

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``; whole heads are read for it."""
        size = self._head_dim
        target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes].reshape(count, self.row_bytes)
        stored = np.empty((size, self.row_bytes), dtype=np.uint8)
        for head in range(start // size, -(-(start + count) // size)):
            self._source.read(head * size, size, memoryview(stored).cast("B"))
            turned = stored.reshape(*self._axes, -1).swapaxes(0, 1).reshape(size, -1)
            low, high = max(start, head * size), min(start + count, (head + 1) * size)
            target[low - start : high - start] = turned[low - head * size : high - head * size]


class Transposed:
    """A matrix stored column by column.

    A band of its rows is held in memory, at most 64 MiB: a wider matrix is read once per band. One thread reads it.

    Args:
        source: The transposed matrix, [columns, rows].
    """

    def __init__(self, source: Rows) -> None:
        self._source, self.dtype = source, source.dtype
        self.rows = source.row_bytes // ITEM_BYTES[source.dtype]
        self.row_bytes = source.rows * ITEM_BYTES[source.dtype]
        self._band = _NO_BAND

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        target = np.frombuffer(out, dtype=f"V{ITEM_BYTES[self.dtype]}")[: count * self._source.rows]
        target = target.reshape(count, self._source.rows)
        done = 0
        while done < count:
            first, band = self._band_with(start + done)
            low = start + done - first
            high = min(low + count - done, len(band))
            target[done : done + high - low] = band[low:high]
            done += high - low
        if start + count == self.rows:
            self._band = _NO_BAND

    def _band_with(self, row: int) -> tuple[int, np.ndarray]:
        """The band that holds a row, and its first row."""
        first, band = self._band
        if first <= row < first + len(band):
            return self._band
        height = max(1, _BAND_BYTES // self.row_bytes)
        first = row // height * height
        self._band = first, self._read_band(first, min(height, self.rows - first))
        return self._band

    def _read_band(self, first: int, height: int) -> np.ndarray:
        kind = f"V{ITEM_BYTES[self.dtype]}"
        band = np.empty((height, self._source.rows), dtype=kind)
        step = max(1, _PIECE_BYTES // self._source.row_bytes)
        piece = np.empty((step, self.rows), dtype=kind)
        for column in range(0, self._source.rows, step):
            count = min(step, self._source.rows - column)
            self._source.read(column, count, memoryview(piece.view(np.uint8)).cast("B"))
            band[:, column : column + count] = piece[:count, first : first + height].T
        return band
