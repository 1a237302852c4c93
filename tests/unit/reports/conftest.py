"""A recorded run to report on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _write_run(folder: Path, steps: int = 30, end: dict[str, Any] | None = None) -> Path:
    """A run's metrics.jsonl as the loop writes it: two starts, a step made twice, a line cut off."""
    start = {"kind": "start", "time": 1.7e9, "step": 0, "restored_from": "random weights", "changed": [],
             "topology": "EP2",
             "world_size": 2, "environment": {"torch": "2"}, "recipe": {"optim.lr": 1e-3}}  # fmt: skip
    entries: list[dict[str, Any]] = [start]
    # Steps 9 and 10 are made twice: the first time with another loss, and slower.
    for first, step in [*((True, s) for s in range(1, 11)), *((False, s) for s in range(9, steps + 1))]:
        entry: dict[str, Any] = {
            "kind": "train", "time": 1.7e9 + step, "step": step, "loss": 5 / step if not first or step < 9 else 77.0,
            "grad_norm": 1.0 + step / 100, "lr": 1e-3 * step, "seconds": 0.5 if not first or step < 9 else 100.0,
            "tokens_per_second": 1e4 + step**2, "tflops_per_process": 1.0 + step, "memory_gb": 1.5 - step / 100,
            "skipped_steps": 0, "router_entropy": 0.9 - step / 1000, "dropped_share": 0.0,
        }  # fmt: skip
        if step == 10:
            entry |= {"loss": "nan", "loss_spike": True}
        if step % 5 == 0:
            entry |= {"expert_load": [[10, 30], [20, 20]], "router_losses": {"load_balancing_loss": [1.0, 1.2]}}
        entries.append(entry)
    entries += [{"kind": "val", "step": step, "val_loss": 10 / step} for step in range(10, steps + 1, 10)]
    entries.append({"kind": "save", "step": 9, "stall_seconds": 0.1})
    entries.append(start | {"step": 8, "changed": ["optim.lr: 1 -> <b>2</b>"]})
    if end is not None:
        entries.append({"kind": "end", "time": 1.8e9} | end)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, entries)) + '\n{"kind": "train", "step": 99, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return _write_run
