"""One layer's and expert's matrix, put together row by row from the boxes it was saved in."""

from dataclasses import dataclass

import numpy as np

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, Extent


@dataclass(frozen=True)
class Tile:
    """A box of one layer's and expert's matrix: where its rows and columns start, and where its data is."""

    row: int
    column: int
    columns: int
    extent: Extent


@dataclass(frozen=True)
class Matrix:
    """A matrix made of tiles that cover it without overlap; `stream.Rows`."""

    dtype: str
    rows: int
    row_bytes: int
    tiles: tuple[Tile, ...]

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        item = ITEM_BYTES[self.dtype]
        for tile in self.tiles:
            first, last = max(start, tile.row), min(start + count, tile.row + tile.extent.rows)
            if first >= last:
                continue
            if tile.extent.row_bytes == self.row_bytes:
                tile.extent.read(first - tile.row, last - first, out[(first - start) * self.row_bytes :])
                continue
            rows = np.empty((last - first, tile.extent.row_bytes), dtype=np.uint8)
            tile.extent.read(first - tile.row, last - first, memoryview(rows).cast("B"))
            target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes].reshape(count, self.row_bytes)
            target[first - start : last - start, tile.column * item : (tile.column + tile.columns) * item] = rows
