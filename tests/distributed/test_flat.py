"""A run takes no more memory, files or threads at its end than after its first steps, and none once it has ended."""

import ctypes
import gc
import os
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig

from mixtral_recipes import api
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import Trainer
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, keep_world, silent, start, tiny_config

# torch keeps a record of the last 2,000 collectives, which is full, at ten a step, before the first.
READ_AT = (220, 260, 300)
# For each step: fewer than two of Python's objects (some of a step are there when it ends), and less than 4 KiB.
MOST_OBJECTS, MOST_BYTES = 2, 4096


class Gauge:
    """Reads what the process has in use after some steps."""

    def __init__(self) -> None:
        self.read: list[dict[str, int]] = []

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] in READ_AT:
            gc.collect()
            self.read.append(
                {
                    "objects": sys.getallocatedblocks(),
                    "bytes": allocated_bytes(),
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                }
            )


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def allocated_bytes() -> int:
    """What C's allocator has given out and not got back; resident memory also has what it keeps for later."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def gauged(folder: str) -> list[dict[str, int]]:
    keep_world()
    gauge = Gauge()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=READ_AT[-1],
        val_check_interval=70,
        limit_val_batches=1,
        log_every_n_steps=10,
        plugins=MegatronMixedPrecision(precision="32"),
        callbacks=[gauge],
    )
    data = MockDataModule(vocab_size=2000, seq_length=32, micro_batch_size=1, global_batch_size=2)
    ckpt = ModelCheckpoint(every_n_train_steps=70)
    with silent():
        api.pretrain(MixtralModel(tiny_config()), data, trainer, NeMoLogger(log_dir=folder, ckpt=ckpt))
    return gauge.read


def test_nothing_grows_with_the_steps(tmp_path: Path) -> None:
    (read,) = launch(1, gauged, str(tmp_path))
    assert read[-1]["files"] == read[0]["files"]
    assert read[-1]["threads"] == read[0]["threads"]
    # What grows with the steps grows between any two readings; what torch or Python build once does not.
    spans = [(late - early, *pair) for (early, late), pair in zip(pairwise(READ_AT), pairwise(read), strict=True)]
    assert min((late["objects"] - early["objects"]) / steps for steps, early, late in spans) < MOST_OBJECTS
    assert min((late["bytes"] - early["bytes"]) / steps for steps, early, late in spans) < MOST_BYTES


class Held:
    """Weak references to what a run has in memory."""

    def __init__(self) -> None:
        self.found: list[tuple[str, weakref.ref[Any]]] = []

    def on_train_start(self, run: Any) -> None:
        parts = [("run", run), ("optimizer", run.optimizer)]
        for chunk in run.ddp:
            parts += [("ddp", chunk), *chunk.named_parameters()]
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                parts += [("weights", buffer.param_data), ("gradients", buffer.grad_data)]
        self.found += [(name, weakref.ref(part)) for name, part in parts if part is not None]

    def there(self) -> list[str]:
        return [name for name, part in self.found if part() is not None]


OVERLAPPING = DistributedDataParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)


def left(folder: str) -> dict[str, tuple[int, list[str]]]:
    """What each kind of run had in memory, counted, and what of it is there after its end."""
    found = {}
    with silent():
        base = start(Job(folder, "base", steps=1)).result["checkpoint"]
        for job in (
            Job(folder, "pretrain", steps=2),
            Job(folder, "overlapping", steps=2, precision="bf16-mixed", layout={"ddp": OVERLAPPING}),
            Job(folder, "lora", steps=2, base=base, lora=True, precision="bf16-mixed"),
            Job(folder, "qlora", steps=2, base=base, lora=True, bits=4, layout={"expert_model_parallel_size": 2}),
        ):
            held = Held()
            start(job, held)
            found[job.name] = len(held.found), held.there()
    return found


def test_nothing_of_a_run_is_left_in_memory(tmp_path: Path) -> None:
    for rank in launch(2, left, str(tmp_path)):
        for kind, (count, there) in rank.items():
            assert count > 20, kind
            assert there == [], kind
