"""Microbatches through torch's loader: read here, or ahead of the training in processes of their own."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mixtral_recipes.data.batches.batch import Batch, Samples

_AHEAD = 64  # microbatches a streaming process may be ahead: making the next window of packs takes it seconds


def microbatches(
    rows: Samples, numbers: Iterable[list[int]], collate: Callable[[list[Any]], Batch], *, num_workers: int = 0
) -> Iterator[Batch]:
    """Collated microbatches of the rows with these numbers."""
    return iter(
        DataLoader(
            rows,  # pyright: ignore[reportArgumentType]
            batch_sampler=numbers,
            collate_fn=collate,
            num_workers=num_workers,
            generator=_own(),
        )
    )


def streamed(batches: Iterable[Batch], *, num_workers: int = 0) -> Iterator[Batch]:
    """Microbatches that are made one after the other; by one process ahead, where processes are allowed."""
    ahead: dict[str, Any] = {"num_workers": 1, "prefetch_factor": _AHEAD} if num_workers else {}
    return iter(DataLoader(_Stream(batches), batch_size=None, generator=_own(), **ahead))


class _Stream(IterableDataset[Batch]):
    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _own() -> torch.Generator:
    """A generator for the workers' seed.

    torch would draw it from the training's random state, which then depended on how often a run was interrupted or
    validated.
    """
    return torch.Generator().manual_seed(0)
