"""What `plan` is asked: the job, the data it goes through, and what is wanted of the answer."""

import enum
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.cli.options.groups import field
from mixtral_recipes.cli.options.place import NprocPerNode, NumGpusPerNode, NumNodes, at_most, gpus_per_node
from mixtral_recipes.cli.options.recipe import (
    PeftScheme,
    hardware_field,
    packed_field,
    performance_field,
    precision_field,
    recipe_field,
)

_PANEL = "Job"
_job = functools.partial(field, rich_help_panel=_PANEL)
_work = functools.partial(field, rich_help_panel="Work and cost")
_goal = functools.partial(field, rich_help_panel="What to look for")


class Task(enum.StrEnum):
    """What kind of job."""

    pretrain = "pretrain"
    finetune = "finetune"


@dataclass
class AskOptions:
    """The job."""

    task: Task | None = _job("--task TASK", "pretrain or finetune (default).")
    recipe: str | None = recipe_field(rich_help_panel=_PANEL)
    yaml: Path | None = _job("--yaml FILE", "The recipe in this file.")
    peft: PeftScheme | None = _job(
        "--peft SCHEME",
        "lora (default), dora, qlora (base in 4 bits; peft.bits=8: in 8), or none (all weights).",
        case_sensitive=False,
    )
    packed: bool | None = packed_field(rich_help_panel=_PANEL)
    precision: str | None = precision_field(rich_help_panel=_PANEL)
    performance_mode: bool = performance_field(rich_help_panel=_PANEL)
    hardware: str | None = hardware_field(rich_help_panel=_PANEL)
    num_nodes: NumNodes = None
    num_gpus_per_node: NumGpusPerNode = None
    nproc_per_node: NprocPerNode = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the recipe function that were given, e.g. ``{"num_nodes": 2}``."""
        given = {
            "precision": self.precision,
            "num_nodes": self.num_nodes,
            "num_gpus_per_node": gpus_per_node(self.num_gpus_per_node, self.nproc_per_node),
            "performance_mode": self.performance_mode or None,
            "peft_scheme": self.peft and self.peft.value,
            "packed_sequence": self.packed,
            "hardware": self.hardware,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class WorkOptions:
    """How much is to be done, and what that costs."""

    data: list[str] | None = _work(
        "--data DATA",
        "The training data: read through with its settings (data.columns=...) and counted. "
        "Several are mixed, as in finetune.",
    )
    epochs: float | None = _work("--epochs N", "Passes over --data; default: 1.", min=0.01, callback=at_most(1e6))
    price: float | None = _work(
        "--price MONEY", "Price of a GPU-hour, in any currency.", min=0.0, callback=at_most(1e9)
    )
    advice: bool = _work("--advice", "Rank, targets, learning rate and batch that suit the data.")


@dataclass
class GoalOptions:
    """What the answer is to be."""

    smallest: bool = _goal("--smallest", "The fewest GPUs it fits on.")
    max_gpus: int | None = _goal(
        "--max-gpus N", "The fastest layout on at most this many GPUs.", min=1, callback=at_most(100_000)
    )
    deadline: str | None = _goal("--deadline TIME", "The fewest GPUs that finish within e.g. 36h or 5d.")
    simulate: bool = _goal("--simulate", "Build one rank's real model without its memory, and measure its peak.")
    calibrate: bool = _goal("--calibrate", "Measure this machine for a minute; later plans use the result.")
    from_run: str | None = _goal("--from-run RUN", "Learn from what a run took; later plans use this.")
