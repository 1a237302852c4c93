"""Rows of several sources in one stream, in given shares.

Shape suffixes: n rows of all sources, s sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Shuffled


class MixedRows:
    """The rows of all sources one after the other; each sample says of which source it is."""

    def __init__(self, parts: Sequence[Any], sources: Sequence[int], num_sources: int) -> None:
        """Put rows together.

        Args:
            parts: The rows of each source.
            sources: The number of each source.
            num_sources: How many sources there are in all.
        """
        self.parts = parts
        self._sources = sources
        self._eye = np.eye(num_sources, dtype=np.bool_)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]
        source = self._eye[self._sources[part]]
        return [{**sample, "source": source} for sample in row] if isinstance(row, list) else {**row, "source": source}


@dataclass(frozen=True)
class Mixture:
    """An order in which the sources take turns by their shares, each going through its own rows again and again.

    An epoch is as long as all sources together. A source's k-th row of an epoch stands at (k + 1/2) / its number of
    rows: the shares hold in every stretch of the stream. A function of the seed and the epoch, as every order.

    Attributes:
        sizes: [s], rows of each source.
        weights: [s], its share; they need not add up to 1.
        seed: Seed of each source's own order.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def counts(self) -> np.ndarray:
        """[s], rows each source gives to an epoch: its share, rounded so that they add up."""
        exact = np.array(self.weights) / sum(self.weights) * sum(self.sizes)
        counts = np.floor(exact).astype(np.int64)
        missing = int(sum(self.sizes) - counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        return counts

    def __call__(self, epoch: int) -> np.ndarray:
        """[n], row numbers of one epoch, as `MixedRows` numbers them."""
        counts = self.counts()
        source = np.repeat(np.arange(len(counts)), counts)
        place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        numbers = np.concatenate([self._rows(number, epoch * int(c), int(c)) for number, c in enumerate(counts)])
        return numbers[np.lexsort((source, place))]

    def _rows(self, source: int, start: int, count: int) -> np.ndarray:
        """The next ``count`` rows of a source from position ``start`` of its own stream of epochs."""
        size, first = self.sizes[source], sum(self.sizes[:source])
        taken: list[np.ndarray] = []
        while count > 0:
            epoch, position = divmod(start, size)
            some = Shuffled(size, self.seed + 7919 * source)(epoch)[position : position + count]
            taken.append(some)
            start, count = start + len(some), count - len(some)
        return first + np.concatenate(taken) if taken else np.empty(0, np.int64)
