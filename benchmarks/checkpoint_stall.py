"""How long training waits for a checkpoint: asynchronous save, memcpy of the state, synchronous save.

    python benchmarks/checkpoint_stall.py --hidden 512 --repeats 7 --folder /big/disk

One process trains a Mixtral of random weights. Each repeat, after a training step, copies as many bytes as the state
has from one buffer to another, saves asynchronously, and saves synchronously; the ratios are taken within a repeat and
their medians reported. The step right after an asynchronous save runs beside the writer: what that costs is reported
too, since on few cores the two compete.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from temporary import temporary_folder

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.system.machine import cores
from mixtral_recipes.training import distributed
from mixtral_recipes.training.run import TrainingRun, build_run
from mixtral_recipes.training.step import train_step

SEQUENCE = 64


@contextlib.contextmanager
def training_run(hidden: int, layers: int) -> Iterator[TrainingRun]:
    """A one-process run on the CPU."""
    config = MixtralConfigTiny(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=2 * hidden, num_moe_experts=8, seq_length=SEQUENCE
    )
    data = MockDataModule(vocab_size=2000, seq_length=SEQUENCE, micro_batch_size=2, global_batch_size=2)
    trainer = Trainer(accelerator="cpu", devices=1, plugins=MegatronMixedPrecision(precision="32"))
    place = distributed.ProcessPlace(0, 0, 1)
    device = distributed.choose_device("cpu", place)
    distributed.initialize(trainer.topology(), place, device, seed=1)
    try:
        data.setup(None)
        optim = MegatronOptimizerModule(OptimizerConfig(lr=1e-4, use_distributed_optimizer=True))
        yield build_run(MixtralModel(config), trainer, data, optim, device=device)
    finally:
        distributed.shut_down()


def checkpointer(run: TrainingRun, folder: Path, *, asynchronous: bool) -> Checkpointer:
    """As the loop makes one."""
    made = Checkpointer(
        folder,
        ModelCheckpoint(save_top_k=0),
        model_name="bench",
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=False,
        context=None,
        facts={},
        asynchronous=asynchronous,
    )
    made.prepare()
    return made


def measure(run: TrainingRun, folder: Path, repeats: int) -> list[dict[str, float]]:
    """Seconds of each part, per repeat."""
    background = checkpointer(run, folder / "background", asynchronous=True)
    waiting = checkpointer(run, folder / "waiting", asynchronous=False)
    source = torch.zeros(background.nbytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    rows = []
    for repeat in range(repeats + 1):
        position = Position(repeat + 1, 0)
        row = {"step": _timed(lambda: train_step(run, batches))}
        row["memcpy"] = _timed(lambda: target.copy_(source))
        row["async_stall"] = _timed(lambda: background.save(position, {}))  # noqa: B023
        row["step_beside_writer"] = _timed(lambda: train_step(run, batches))
        row["async_rest"] = _timed(background.wait)
        row["sync_save"] = _timed(lambda: waiting.save(position, {}))  # noqa: B023
        if repeat:  # the first one warms up
            rows.append(row)
    return rows


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    arguments = parser.parse_args()
    with temporary_folder(arguments.folder) as folder, training_run(arguments.hidden, arguments.layers) as run:
        nbytes = checkpointer(run, folder, asynchronous=False).nbytes
        rows = measure(run, folder, arguments.repeats)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    report = {
        "state_bytes": nbytes,
        "cores": cores(),
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "async_stall_over_memcpy": round(statistics.median(r["async_stall"] / r["memcpy"] for r in rows), 3),
        "async_stall_over_sync_save": round(statistics.median(r["async_stall"] / r["sync_save"] for r in rows), 3),
        "step_beside_writer_over_step": round(statistics.median(r["step_beside_writer"] / r["step"] for r in rows), 3),
        "targets": {"async_stall_over_memcpy": 1.3, "async_stall_over_sync_save": 0.1},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
