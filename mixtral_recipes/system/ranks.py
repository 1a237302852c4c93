"""What one rank decides or finds, told to all of them, so that every rank goes on, or fails, alike."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.errors import LaunchError, MixtralRecipesError


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

    The lock dies with the process that holds it.

    Raises:
        LaunchError: another run holds it; on every rank.
    """
    descriptor: int | None = None

    def take() -> None:
        nonlocal descriptor
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise LaunchError(
                f"{folder} is being written by another run ({holder or 'unknown'}); choose another --name or --dir, "
                "or wait for it."
            ) from None
        os.ftruncate(descriptor, 0)
        text = f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}\n"
        os.pwrite(descriptor, text.encode(), 0)

    try:
        first(take)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
