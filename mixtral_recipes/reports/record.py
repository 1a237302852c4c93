"""What RUN/metrics.jsonl says about a run. Standard library only."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import RecipeError


@dataclass
class RunRecord:
    """A run as it was recorded.

    Attributes:
        folder: The run's folder.
        steps: Step -> metrics of training, by step; of a step made twice, after a resume, the later ones.
        validations: Step -> metrics of validation, likewise.
        starts: How each process of the run started, in order.
        saves: Each checkpoint's step and how long training waited for it.
        end: How it ended last; empty while it runs, or when it was killed.
        plan: What the planner expected of its steps and memory; empty where it knew no such card.
    """

    folder: Path
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def against_plan(self) -> dict[str, dict[str, float]]:
        """``step_seconds`` and ``memory_gb``, each ``predicted`` and ``measured``; empty without a plan or steps.

        A step is the median of all but the first two, which compile kernels.
        """
        seconds = [value for _, value in self.series("seconds")][2:]
        memory = [value for _, value in self.series("memory_gb")]
        measured = {
            "step_seconds": statistics.median(seconds) if seconds else None,
            "memory_gb": max(memory, default=None),
        }
        return {
            name: {"predicted": _number(self.plan[name]), "measured": round(value, 4)}
            for name, value in measured.items()
            if value is not None and name in self.plan
        }

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one training metric, by step; what is not finite is left out."""
        found = [(step, _number(metrics.get(name))) for step, metrics in self.steps.items()]
        return [(step, value) for step, value in found if math.isfinite(value)]

    def source_losses(self) -> dict[str, list[tuple[float, float]]]:
        """(step, training loss) of each source of a mixture, by its name."""
        names = dict.fromkeys(key for metrics in self.steps.values() for key in metrics if key.startswith("loss/"))
        return {name.removeprefix("loss/"): self.series(name) for name in names}

    def validation_losses(self) -> list[tuple[float, float]]:
        """(step, validation loss), by step."""
        return [(step, _number(metrics.get("val_loss"))) for step, metrics in self.validations.items()]

    def expert_load(self, last: int = 20) -> list[list[float]]:
        """Each expert's load over an even share, [layers][experts], summed over the last logged steps."""
        logged = [m["expert_load"] for m in self.steps.values() if m.get("expert_load")][-last:]
        if not logged:
            return []
        total = [
            [sum(load[layer][e] for load in logged) for e in range(len(row))] for layer, row in enumerate(logged[0])
        ]
        return [[value / (sum(row) / len(row) or 1) for value in row] for row in total]


def read_run(folder: Path) -> RunRecord:
    """Read a run's record; a line that a kill cut off is left out.

    Raises:
        RecipeError: it is not a run folder.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise RecipeError(f"{folder} is no run folder: it has no metrics.jsonl; name the folder RUN (log_dir/name).")
    record = RunRecord(folder)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                kind = entry["kind"]
            except (ValueError, KeyError, TypeError):
                continue
            _add(record, kind, entry)
    record.steps = dict(sorted(record.steps.items()))
    record.validations = dict(sorted(record.validations.items()))
    return record


def _add(record: RunRecord, kind: str, entry: dict[str, Any]) -> None:
    if kind == "start":
        record.starts.append(entry)
        record.end = {}
    elif kind == "train":
        record.steps[int(entry["step"])] = entry
    elif kind == "val":
        record.validations[int(entry["step"])] = entry
    elif kind == "save":
        record.saves.append(entry)
    elif kind == "plan":
        record.plan = entry
    elif kind == "end":
        record.end = entry


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
