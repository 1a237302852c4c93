"""What a training step waits for: values of tensors read on the host, where a GPU would have to be done, and data."""

import collections
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from mixtral_recipes.data.batches.batch import Batch
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.training.step import train_step
from tests.distributed.small_run import Case, build

_READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@contextlib.contextmanager
def _counted() -> Iterator[collections.Counter[str]]:
    """Counts reads by the file and function that makes them."""
    places: collections.Counter[str] = collections.Counter()

    def counting(read: Any) -> Any:
        def read_and_count(*args: Any, **named: Any) -> Any:
            code = sys._getframe(1).f_code
            places["/".join(Path(code.co_filename).parts[-2:]) + ":" + code.co_name] += 1
            return read(*args, **named)

        return read_and_count

    with contextlib.ExitStack() as stack:
        for name in _READS:
            stack.enter_context(mock.patch.object(Tensor, name, counting(getattr(Tensor, name))))
        yield places


def reads_of_a_step(layers: int, microbatches: int, target_modules: list[str] | None) -> dict[str, int]:
    """Reads in the second step of a small run of full sequences, after what the first one sets up."""
    data = {"global_batch_size": microbatches, "micro_batch_size": 1, "full": True}
    peft = None if target_modules is None else LoRA(target_modules=target_modules)
    run = build(Case(model={"num_layers": layers}, data=data, peft=peft))
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    train_step(run, batches)
    with _counted() as places:
        train_step(run, batches)
    return dict(places)


def data_wait_of_a_slow_module(microbatches: int, seconds: float) -> float:
    """What a step says it waited for batches that take this long each."""
    run = build(Case(model={"num_layers": 1}, data={"global_batch_size": microbatches, "micro_batch_size": 1}))

    def slow() -> Iterator[Batch]:
        for batch in run.data.train_batches(run.data_place, **run.loader_shape):
            time.sleep(seconds)
            yield batch

    return train_step(run, slow()).data_wait
