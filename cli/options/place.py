"""Where a job runs and writes: this machine or a Slurm cluster, how many processes, which folder."""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.settings.ranges import RANGES


def at_most(most: float) -> Callable[[float | None], float | None]:
    """A check of an option's value; Typer's own `max` writes it into the help, whose column it widens."""

    def check(value: float | None) -> float | None:
        if value is not None and not value <= most:
            raise typer.BadParameter(f"{value:,} is more than {most:,}.")
        return value

    return check


up_to_most_nodes, up_to_most_per_node = (at_most(RANGES[name].high) for name in ("num_nodes", "devices"))
option = functools.partial(typer.Option, rich_help_panel="Where it runs")
slurm_option = functools.partial(typer.Option, rich_help_panel="Slurm")


class ExecutorName(enum.StrEnum):
    """Where a job runs."""

    direct = "direct"
    local = "local"
    slurm = "slurm"


NumNodes = Annotated[
    int | None,
    option("--num-nodes", metavar="N", min=1, callback=up_to_most_nodes, help="Nodes; default: the recipe's."),
]
NumGpusPerNode = Annotated[
    int | None,
    option(
        "--num-gpus-per-node",
        metavar="N",
        min=1,
        callback=up_to_most_per_node,
        help="Processes per node, one per GPU; default: the recipe's. Also called --nproc-per-node.",
    ),
]
NprocPerNode = Annotated[int | None, option("--nproc-per-node", min=1, callback=up_to_most_per_node, hidden=True)]
Detach = Annotated[bool, slurm_option("--detach", help="Return once the job is queued.")]


@dataclass
class PlaceOptions:
    """Where a job runs and writes."""

    executor: Annotated[
        ExecutorName,
        option("--executor", metavar="WHERE", help="direct (this process), local (torchrun) or slurm (a cluster)."),
    ] = ExecutorName.local
    num_nodes: NumNodes = None
    num_gpus_per_node: NumGpusPerNode = None
    nproc_per_node: NprocPerNode = None
    dir: Annotated[Path | None, option("--dir", metavar="DIR", help="Folder of runs; default: runs.")] = None
    name: Annotated[
        str | None, option("--name", metavar="NAME", help="Run name; default: the recipe and the time.")
    ] = None

    cluster: Annotated[str | None, slurm_option("--cluster", metavar="NAME", help="A profile of clusters.toml.")] = None
    account: Annotated[
        str | None, slurm_option("--account", metavar="NAME", help="Account; default: the profile's.")
    ] = None
    partition: Annotated[
        str | None, slurm_option("--partition", metavar="NAME", help="Partition; default: the profile's.")
    ] = None
    time: Annotated[
        str | None,
        slurm_option("--time", metavar="HH:MM:SS", help="Time limit of one attempt; a longer job comes back."),
    ] = None
    retries: Annotated[
        int | None,
        slurm_option("--retries", metavar="N", min=0, help="Restarts after a failure; preemptions are not counted."),
    ] = None
    slurm: Annotated[
        list[str] | None,
        slurm_option(
            "--slurm", metavar="KEY=VALUE", help="Any other setting of a profile, e.g. --slurm env.NCCL_DEBUG=INFO."
        ),
    ] = None
    detach: Detach = False

    @property
    def sizes(self) -> dict[str, int]:
        """The recipe arguments that were given: ``num_nodes``, ``num_gpus_per_node``."""
        given = {"num_nodes": self.num_nodes, "num_gpus_per_node": self.num_gpus_per_node or self.nproc_per_node}
        return {name: value for name, value in given.items() if value is not None}
