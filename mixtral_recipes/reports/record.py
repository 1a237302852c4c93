"""What RUN/metrics.jsonl says about a run. Loads nothing heavy."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.system.files import lines_of, read_json
from mixtral_recipes.system.json_files import parse_object
from mixtral_recipes.system.pointers import refuse_pointer
from mixtral_recipes.system.schema import Count, Moment, fits

_LONGEST_LINE = 16 << 20  # bytes; a step of the largest Mixtral has some ten thousand
_LARGEST = 1e30  # of what is drawn: sums of such numbers are finite
_MOST_CELLS = 20_000  # of the chart of expert loads

type Number = float | Annotated[str, Meta(max_length=40)]  # "nan" is text in JSON
type Text = Annotated[str, Meta(max_length=100_000)]


class _Line(TypedDict, total=False):
    """What any line may say; other names are numbers that callbacks recorded."""

    time: Moment
    step: Count


class _Step(TypedDict):
    step: Count


class _Start(_Line, total=False):
    restored_from: Text | None
    changed: list[Text]
    world_size: Count
    topology: Text
    environment: dict[str, Any]
    recipe: dict[str, Any]
    lineage: list[dict[str, Any]]


class _Metrics(_Line, total=False):
    loss: Number
    grad_norm: Number
    lr: Number
    seconds: Number
    data_wait_seconds: Number
    tokens_per_second: Number
    tflops_per_process: Number
    memory_gb: Number
    skipped_steps: Number
    router_entropy: Number
    dropped_share: Number
    val_loss: Number
    loss_spike: bool
    expert_load: list[list[Annotated[float, Meta(ge=0, le=_LARGEST)]]] | None
    router_losses: dict[str, list[Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]]] | None


class _Save(TypedDict):
    step: Count
    stall_seconds: Annotated[float, Meta(ge=0)]


class _End(_Line, total=False):
    error: Text


class _Plan(_Line, total=False):
    hardware: Text
    step_seconds: Number
    memory_gb: Number


# Of each kind, what a line must be to be used.
_SHAPES: dict[str, tuple[Any, ...]] = {
    "start": (_Start,),
    "train": (_Step, _Metrics),
    "val": (_Step, _Metrics),
    "save": (_Save, _Line),
    "end": (_End,),
    "plan": (_Plan,),
}


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
        skipped: How many lines could not be used: one that a kill cut off, or that somebody else wrote.
        result: What result.json says; empty before the run's end.
    """

    folder: Path
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    result: dict[str, Any] = field(default_factory=dict)

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
        size = [len(row) for row in logged[-1]] if logged else []
        logged = [load for load in logged if [len(row) for row in load] == size]
        if not 0 < sum(size) <= _MOST_CELLS or len(set(size)) > 1:
            return []
        total = [
            [sum(load[layer][e] for load in logged) for e in range(len(row))] for layer, row in enumerate(logged[0])
        ]
        return [[value / (sum(row) / len(row) or 1) for value in row] for row in total]


def read_run(folder: Path) -> RunRecord:
    """Read a run's record; lines that cannot be used are counted and left out.

    Raises:
        RecipeError: it is not a run folder.
    """
    path = folder / "metrics.jsonl"
    refuse_pointer(path, RecipeError)
    if not path.is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no metrics.jsonl; pass the folder RUN (log_dir/name).")
    record = RunRecord(folder, result=read_json(folder / "result.json") or {})
    with path.open("rb") as file:
        for line in lines_of(file, _LONGEST_LINE):
            entry = _entry(line)
            if entry is not None:
                _add(record, entry["kind"], entry)
            elif line is None or line.strip():
                record.skipped += 1
    record.steps = dict(sorted(record.steps.items()))
    record.validations = dict(sorted(record.validations.items()))
    return record


def _entry(line: bytes | None) -> dict[str, Any] | None:
    """What a line says; None where it cannot be used."""
    try:
        entry = parse_object(line or b"", finite=False)
    except (ValueError, TypeError):
        return None
    kind = entry.get("kind")
    if not isinstance(kind, str) or not all(fits(entry, shape) for shape in _SHAPES.get(kind, ())):
        return None
    return entry


def _add(record: RunRecord, kind: str, entry: dict[str, Any]) -> None:
    if kind == "start":
        record.starts.append(entry)
        record.end = {}
    elif kind == "train":
        record.steps[entry["step"]] = entry
    elif kind == "val":
        record.validations[entry["step"]] = entry
    elif kind == "save":
        record.saves.append(entry)
    elif kind == "plan":
        record.plan = entry
    elif kind == "end":
        record.end = entry


def _number(value: Any) -> float:
    """A metric as a number; NaN if it cannot be drawn."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) <= _LARGEST else math.nan
