"""The processes that share a job, and how they reach the same decisions: the first one's results are sent to all.

Loads torch only where there is more than one process.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import MixtralRecipesError, of_the_machine
from mixtral_recipes.system.locks import held_or_refused


def launched() -> bool:
    """Whether this process is one of a job's ranks: torchrun started it, or it has joined a process group already.

    RANK, WORLD_SIZE, MASTER_ADDR and SLURM_* do not count by themselves: a login shell inside an allocation has them
    too. Nor does a part of what torchrun sets, left over in a shell.
    """
    return _from_torchrun() is not None or _process_group() is not None


def launched_rank() -> int:
    """This process's rank, also before there is a process group; 0 in a process that no launcher started."""
    return _process_group().get_rank() if _process_group() else (_from_torchrun() or {}).get("RANK", 0)


def launched_local_rank() -> int:
    """This process's rank on its node; 0 in a process that no launcher started."""
    local = os.environ.get("LOCAL_RANK", "0") if launched() else "0"
    return int(local) if local.isdigit() else 0


def launched_size() -> int:
    """How many ranks the job has; 1 in a process that no launcher started."""
    return _process_group().get_world_size() if _process_group() else (_from_torchrun() or {}).get("WORLD_SIZE", 1)


def _from_torchrun() -> dict[str, int] | None:
    """The numbers torchrun gave this process; None where it did not start it."""
    if not all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR")):
        return None
    texts = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    if not all(text.isdigit() for text in texts.values()):
        return None
    numbers = {name: int(text) for name, text in texts.items()}
    return numbers if numbers["LOCAL_RANK"] <= numbers["RANK"] < numbers["WORLD_SIZE"] else None


def _process_group() -> Any:
    """``torch.distributed`` where this process has joined a group, else None. Imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    distributed = _process_group()
    return (distributed.get_rank(), distributed.get_world_size()) if distributed else (0, 1)


_meetings = itertools.count()


def meet(backend: str, timeout: timedelta | None = None) -> None:
    """Join the processes torchrun started in the default process group; a process alone needs no rendezvous.

    Torch names that group and its keys in torchrun's store alike each time, so that a rank that comes first would find
    there where the others were the last time: every meeting has keys of its own. And each time it has one more
    ``[rank0]:`` put before the lines of an error that ends the process: one is kept.

    Args:
        backend: gloo or nccl.
        timeout: After which a collective fails; None uses torch's.
    """
    from torch._C._distributed_c10d import HashStore, PrefixStore
    from torch.distributed import init_process_group
    from torch.distributed.rendezvous import rendezvous

    waits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    told = sys.excepthook
    if launched_size() == 1:
        init_process_group(backend, store=HashStore(), rank=0, world_size=1, **waits)
    else:
        store, rank, size = next(rendezvous("env://", **waits))
        store = PrefixStore(f"meeting_{next(_meetings)}", store)
        if timeout is not None:
            store.set_timeout(timeout)
        init_process_group(backend, store=store, rank=rank, world_size=size, **waits)
    if getattr(told, "__module__", None) == init_process_group.__module__:
        sys.excepthook = told


@contextlib.contextmanager
def joined() -> Iterator[Any]:
    """Join the processes torchrun started, over gloo; where they have joined already, yield a gloo group of all.

    Yields:
        What `first`, `gathered` and `first_holds` take; None is the default group.
    """
    if launched_size() == 1:
        yield None
        return
    import torch.distributed as distributed

    if not distributed.is_initialized():
        meet("gloo")
        try:
            yield None
        finally:
            distributed.destroy_process_group()
        return
    own = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
    try:
        yield own
    finally:
        if own is not None:
            distributed.destroy_process_group(own)


def first[T](work: Callable[[], T], group: Any = None) -> T:
    """Do something on rank 0; every rank gets its result, or raises its error."""
    rank, size = rank_and_size()
    if size == 1:
        return work()
    import torch.distributed as distributed

    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = _sendable(error)
    distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered[T](value: T, group: Any = None) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    import torch.distributed as distributed

    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value, group=group)
    return values


def shared[T](work: Callable[[], T], group: Any = None) -> list[T]:
    """Each rank does its part; every rank gets all results, in rank order, or raises the first error."""
    if rank_and_size()[1] == 1:
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = _sendable(error)
    parts = gathered((result, failure), group)
    for _, error in parts:
        if error is not None:
            raise error
    return [part for part, _ in parts]  # pyright: ignore[reportReturnType]


def _sendable(error: Exception) -> Exception:
    return error if isinstance(error, MixtralRecipesError) else of_the_machine(error) or RuntimeError(repr(error))


@contextlib.contextmanager
def first_holds[T](open_context: Callable[[], AbstractContextManager[T]], group: Any = None) -> Iterator[T]:
    """A context rank 0 holds for all, while they work together; it sees an exception where any rank had one."""
    with contextlib.ExitStack() as stack:
        value = first(lambda: stack.enter_context(open_context()), group)
        try:
            yield value
        except Exception as error:
            gathered(str(error), group)
            raise
        failures = [failure for failure in gathered(None, group) if failure is not None]
        if failures:
            raise MixtralRecipesError(f"another process failed: {failures[0]}")
        first(stack.close, group)


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
