"""What a run is expected to take, noted at its start so that its report can hold it against what it took."""

from typing import Any

from mixtral_recipes.layout import cards
from mixtral_recipes.planner import calibration, memory, speed
from mixtral_recipes.planner.workload import Workload


def predict(recipe: Any, gpu_name: str | None) -> dict[str, Any] | None:
    """A recipe's memory and time on this machine's card.

    Args:
        recipe: Its parts, built: ``model``, ``trainer``, ``data``, ``optim``, ``peft``.
        gpu_name: What the driver calls the GPU; None on a CPU.

    Returns:
        ``hardware``, ``step_seconds`` with ``_low`` and ``_high``, ``memory_gb`` (what torch allocates on a GPU; all of
        a process on a CPU) and ``memory_gb_by_category``; None for a GPU that is in no table.
    """
    name = "cpu" if gpu_name is None else cards.named(gpu_name)
    if name is None:
        return None
    card, job = calibration.corrected(cards.card(name)), Workload.of(recipe)
    job = job.on_cpu() if name == "cpu" else job
    taken, time = memory.of_job(job, card), speed.of_job(job, card)
    return {
        "hardware": name,
        "step_seconds": round(time.step, 4),
        "step_seconds_low": round(time.low, 4),
        "step_seconds_high": round(time.high, 4),
        "memory_gb": round(taken.total if name == "cpu" else taken.allocated, 3),
        "memory_gb_by_category": taken.as_json(),
    }
