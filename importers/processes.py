"""One job over the processes torchrun started: what the first decides, the others are told."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import CheckpointError, MixtralRecipesError


def is_first() -> bool:
    """Whether this is the process that prints: the first of those torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """This process among those that share a job."""

    rank: int = 0
    count: int = 1
    group: Any = None  # gloo, whatever the training uses; None is the default group

    @staticmethod
    @contextlib.contextmanager
    def join() -> Iterator["Processes"]:
        """Join the processes torchrun started (or the process group that exists); alone otherwise."""
        import torch.distributed as dist

        if dist.is_initialized():
            own = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            try:
                yield Processes(dist.get_rank(), dist.get_world_size(), own)
            finally:
                if own is not None:
                    dist.destroy_process_group(own)
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo")
            try:
                yield Processes(dist.get_rank(), dist.get_world_size())
            finally:
                dist.destroy_process_group()
        else:
            yield Processes()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, in every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first[T](self, work: Callable[[], T]) -> T:
        """Do something in the first process only; every process gets its result, or its exception."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error if isinstance(error, MixtralRecipesError) else RuntimeError(repr(error))
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextlib.contextmanager
    def first_holds[T](self, open_context: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """A context the first process holds for all; it sees an exception if any process had one."""
        with ExitStack() as stack:
            value = self.first(lambda: stack.enter_context(open_context()))
            try:
                yield value
            except Exception as error:
                self.gather(str(error))
                raise
            failures = [failure for failure in self.gather(None) if failure is not None]
            if failures:
                raise CheckpointError(f"another process failed: {failures[0]}")
            self.first(stack.close)
