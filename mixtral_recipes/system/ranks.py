"""What one rank decides or finds, told to all of them, so that every rank goes on, or fails, alike."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.system.locks import held_or_refused


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def first[T](work: Callable[[], T]) -> T:
    """Do something on rank 0; every rank gets its result, or raises its error."""
    rank, size = rank_and_size()
    if size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error if isinstance(error, MixtralRecipesError) else RuntimeError(repr(error))
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered[T](value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock on rank 0, so that two runs never write checkpoints into one folder.

    Raises:
        LaunchError: another run holds it; on every rank.
    """
    with contextlib.ExitStack() as stack:
        lock = held_or_refused(folder, f"{folder} is being written by another run")
        first(lambda: stack.enter_context(lock))
        yield
