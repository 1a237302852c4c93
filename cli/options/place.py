"""Where a job runs and writes: this machine or a Slurm cluster, how many processes, which folder."""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_recipes.cli.options.groups import field, option
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.ranges import RANGES


def at_most(most: float) -> Callable[[float | None], float | None]:
    """A check of an option's value; Typer's own `max` writes it into the help, whose column it widens."""

    def check(value: float | None) -> float | None:
        if value is not None and not value <= most:
            raise typer.BadParameter(f"{value:,} is more than {most:,}.")
        return value

    return check


up_to_most_nodes, up_to_most_per_node = (at_most(RANGES[name].high) for name in ("num_nodes", "devices"))
_here = functools.partial(field, rich_help_panel="Where it runs")
_slurm = functools.partial(field, rich_help_panel="Slurm")


class ExecutorName(enum.StrEnum):
    """Where a job runs."""

    direct = "direct"
    local = "local"
    slurm = "slurm"


NumNodes = Annotated[
    int | None,
    option(
        "--num-nodes N",
        "Nodes; default: the recipe's.",
        min=1,
        callback=up_to_most_nodes,
        rich_help_panel="Where it runs",
    ),
]
NumGpusPerNode = Annotated[
    int | None,
    option(
        "--num-gpus-per-node N",
        "Processes per node, one per GPU; default: the recipe's. Also called --nproc-per-node.",
        min=1,
        callback=up_to_most_per_node,
        rich_help_panel="Where it runs",
    ),
]
NprocPerNode = Annotated[int | None, option("--nproc-per-node", "", min=1, callback=up_to_most_per_node, hidden=True)]


def gpus_per_node(num_gpus_per_node: int | None, nproc_per_node: int | None) -> int | None:
    """What was given under either name.

    Raises:
        RecipeError: both were, and differ.
    """
    if num_gpus_per_node and nproc_per_node and num_gpus_per_node != nproc_per_node:
        raise RecipeError(
            f"--num-gpus-per-node {num_gpus_per_node} and --nproc-per-node {nproc_per_node} are the same setting; "
            "use only one."
        )
    return num_gpus_per_node or nproc_per_node


Detach = Annotated[bool, option("--detach", "Return once the job is queued.", rich_help_panel="Slurm")]


@dataclass
class PlaceOptions:
    """Where a job runs and writes."""

    executor: ExecutorName = _here(
        "--executor WHERE", "direct (this process), local (torchrun) or slurm (a cluster).", ExecutorName.local
    )
    num_nodes: NumNodes = None
    num_gpus_per_node: NumGpusPerNode = None
    nproc_per_node: NprocPerNode = None
    dir: Path | None = _here("--dir DIR", "Folder of runs; default: runs.")
    name: str | None = _here("--name NAME", "Run name; default: the recipe and the time.")

    cluster: str | None = _slurm("--cluster NAME", "A profile of clusters.toml.")
    account: str | None = _slurm("--account NAME", "Account; default: the profile's.")
    partition: str | None = _slurm("--partition NAME", "Partition; default: the profile's.")
    time: str | None = _slurm("--time HH:MM:SS", "Time limit of one attempt; a longer job is requeued.")
    retries: int | None = _slurm("--retries N", "Restarts after a failure; preemptions do not count.", min=0)
    slurm: list[str] | None = _slurm(
        "--slurm KEY=VALUE", "Any other setting of a profile, e.g. --slurm env.NCCL_DEBUG=INFO."
    )
    detach: Detach = False

    @property
    def sizes(self) -> dict[str, int]:
        """The recipe arguments that were given: ``num_nodes``, ``num_gpus_per_node``."""
        per_node = gpus_per_node(self.num_gpus_per_node, self.nproc_per_node)
        given = {"num_nodes": self.num_nodes, "num_gpus_per_node": per_node}
        return {name: value for name, value in given.items() if value is not None}

    def over_profile(self) -> dict[str, Any]:
        """What was given over the cluster's profile, e.g. ``{"partition": "gpu"}``.

        Raises:
            LaunchError: an unknown setting, or one for Slurm without ``--executor slurm``.
        """
        from mixtral_recipes.errors import LaunchError
        from mixtral_recipes.executors.slurm.profile import settings_from

        own = {name: getattr(self, name) for name in ("account", "partition", "time", "retries")}
        given = {name: value for name, value in own.items() if value is not None}
        settings = settings_from(self.slurm or []) | given
        names = ["cluster"] * bool(self.cluster) + list(given) + ["slurm"] * bool(self.slurm) + ["detach"] * self.detach
        if names and self.executor != "slurm":
            ignored = ", ".join(f"--{name}" for name in names)
            raise LaunchError(f"{ignored}: no effect with --executor {self.executor}; use --executor slurm.")
        return settings
