"""A job that keeps the contract between a launcher and ``mixtral_recipes.api`` without a model.

It resumes from RUN/state.json, all-reduces over gloo at every step, agrees with the other ranks on stopping, saves and
exits 75 on SIGTERM, and rank 0 writes RUN/result.json.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


class Log:
    """Where the run folder is."""

    def __init__(self, log_dir: str, name: str) -> None:
        self.folder = Path(log_dir, name)


class Trainer:
    """How many processes."""

    def __init__(self, devices: int = 1, num_nodes: int = 1) -> None:
        self.devices, self.num_nodes = devices, num_nodes


class Wait:
    """A callback of the real training that makes every step longer, without work for the machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_start(self, run: object, step: int) -> None:
        time.sleep(self.seconds)


def train(
    log: Log,
    trainer: Trainer,
    steps: int = 5,
    step_s: float = 0.0,
    fail_rank: int = -1,
    fail_once: bool = False,
    text: str = "",
    dump_env: str = "",
) -> None:
    """Add up 1 / (step + 1) over the steps; every rank prints what it does.

    ``dump_env`` writes the lengths and hashes of all variables that start with it to RUN/env.json.
    """
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    import torch
    import torch.distributed as dist

    if world_size > 1:
        dist.init_process_group("gloo")
    state_file, marker = log.folder / "state.json", log.folder / f"failed-{rank}"
    step, loss = json.loads(state_file.read_text()) if state_file.exists() else (0, 0.0)
    print(f"rank {rank} of {world_size} starts at step {step}", flush=True)
    if dump_env and rank == 0:
        log.folder.mkdir(parents=True, exist_ok=True)
        found = {key: value for key, value in os.environ.items() if key.startswith(dump_env)}
        hashes = {key: hashlib.sha256(value.encode()).hexdigest() for key, value in found.items()}
        (log.folder / "env.json").write_text(json.dumps(hashes | {"text": hashlib.sha256(text.encode()).hexdigest()}))
    if rank == fail_rank and not (fail_once and marker.exists()):
        log.folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        raise ValueError(f"told to fail in rank {rank}")
    while step < steps:
        time.sleep(step_s)
        agreed = torch.tensor([1 / (step + 1), float(len(stopped))], dtype=torch.float64)
        if world_size > 1:
            dist.all_reduce(agreed)
        loss += agreed[0].item() / world_size
        step += 1
        print(f"rank {rank} step {step} loss {loss:.12f}", flush=True)
        if rank == 0:
            log.folder.mkdir(parents=True, exist_ok=True)
            state_file.with_suffix(".tmp").write_text(json.dumps([step, loss]))
            state_file.with_suffix(".tmp").rename(state_file)
        if agreed[1].item():
            print(f"rank {rank} saved at step {step}", flush=True)
            sys.exit(75)
    if rank == 0:
        result = {"recipe": "job", "steps": steps, "world_size": world_size, "last_loss": loss}
        (log.folder / "result.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


def expected_loss(steps: int) -> float:
    """The uninterrupted run's last loss, added up in the same order."""
    loss = 0.0
    for step in range(steps):
        loss += 1 / (step + 1)
    return loss
