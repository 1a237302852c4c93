"""What `plan` is asked: the job, the data it goes through, and what is wanted of the answer."""

import enum
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.place import NprocPerNode, NumGpusPerNode, NumNodes, at_most
from mixtral_recipes.cli.options.recipe import HARDWARE_HELP, complete_card, complete_recipe

job_option = functools.partial(typer.Option, rich_help_panel="Job")
work_option = functools.partial(typer.Option, rich_help_panel="Work and cost")
goal_option = functools.partial(typer.Option, rich_help_panel="What to look for")


class Task(enum.StrEnum):
    """What kind of job."""

    pretrain = "pretrain"
    finetune = "finetune"


@dataclass
class AskOptions:
    """The job."""

    task: Annotated[Task | None, job_option("--task", metavar="TASK", help="pretrain or finetune (default).")] = None
    recipe: Annotated[
        str | None,
        job_option(
            "--recipe",
            metavar="NAME",
            help="One of `recipes list`, or your MODULE.FUNCTION.",
            autocompletion=complete_recipe,
        ),
    ] = None
    yaml: Annotated[Path | None, job_option("--yaml", metavar="FILE", help="The recipe in this file.")] = None
    peft: Annotated[
        str | None,
        job_option(
            "--peft",
            metavar="SCHEME",
            help="lora (default), dora, qlora (base in 4 bits; peft.bits=8: in 8), or none (all weights).",
        ),
    ] = None
    packed: Annotated[bool | None, job_option("--packed/--no-packed", help="Several samples per sequence.")] = None
    precision: Annotated[
        str | None, job_option("--precision", metavar="TYPE", help="bf16, fp8, or fp32 for mixtral_tiny.")
    ] = None
    performance_mode: Annotated[
        bool, job_option("--performance-mode", help="NeMo's performance mode: token drop, overlap, bf16 reduction.")
    ] = False
    hardware: Annotated[
        str | None,
        job_option(
            "--hardware",
            metavar="GPU",
            help=HARDWARE_HELP,
            autocompletion=complete_card,
        ),
    ] = None
    num_nodes: NumNodes = None
    num_gpus_per_node: NumGpusPerNode = None
    nproc_per_node: NprocPerNode = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the recipe function that were given, e.g. ``{"num_nodes": 2}``."""
        given = {
            "precision": self.precision,
            "num_nodes": self.num_nodes,
            "num_gpus_per_node": self.num_gpus_per_node or self.nproc_per_node,
            "performance_mode": self.performance_mode or None,
            "peft_scheme": self.peft,
            "packed_sequence": self.packed,
            "hardware": self.hardware,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class WorkOptions:
    """How much is to be done, and what that costs."""

    data: Annotated[
        list[str] | None,
        work_option(
            "--data",
            metavar="DATA",
            help="What it would be trained on: read through with its settings (data.columns=...), and counted. "
            "Several are mixed, as finetune mixes them.",
        ),
    ] = None
    epochs: Annotated[
        float | None,
        work_option("--epochs", metavar="N", min=0.01, callback=at_most(1e6), help="Passes over --data; default: 1."),
    ] = None
    price: Annotated[
        float | None,
        work_option("--price", metavar="MONEY", min=0.0, callback=at_most(1e9), help="Of a GPU-hour, in any currency."),
    ] = None
    advice: Annotated[
        bool, work_option("--advice", help="Rank, targets, learning rate and batch that suit the data.")
    ] = False


@dataclass
class GoalOptions:
    """What the answer is to be."""

    smallest: Annotated[bool, goal_option("--smallest", help="The fewest GPUs it fits on.")] = False
    max_gpus: Annotated[
        int | None,
        goal_option(
            "--max-gpus",
            metavar="N",
            min=1,
            callback=at_most(100_000),
            help="The fastest layout on at most so many GPUs.",
        ),
    ] = None
    deadline: Annotated[
        str | None, goal_option("--deadline", metavar="TIME", help="The fewest GPUs that are done in e.g. 36h or 5d.")
    ] = None
    simulate: Annotated[
        bool, goal_option("--simulate", help="Build one rank's real model without its memory, and measure its peak.")
    ] = False
    calibrate: Annotated[
        bool, goal_option("--calibrate", help="Measure this machine for a minute; later plans use it.")
    ] = False
    from_run: Annotated[
        str | None, goal_option("--from-run", metavar="RUN", help="Learn from what a run took; later plans use it.")
    ] = None
