"""Options that several commands share, declared once."""

import enum
from pathlib import Path
from typing import Annotated

import typer


class ExecutorName(enum.StrEnum):
    """Where a job runs."""

    direct = "direct"
    local = "local"
    slurm = "slurm"


class PeftScheme(enum.StrEnum):
    """What is trained."""

    lora = "lora"
    dora = "dora"
    none = "none"


def complete_override(incomplete: str) -> list[str]:
    """Override paths that start with what is typed."""
    from mixtral_recipes.overrides.completion import PATHS

    return [f"{path}=" for path in PATHS if path.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Recipe names that start with what is typed."""
    from mixtral_recipes.recipes.catalog import names

    return [name for name in names() if name.startswith(incomplete)]


Recipe = Annotated[
    str | None, typer.Option("--recipe", help="Recipe name (`recipes list`).", autocompletion=complete_recipe)
]
Dir = Annotated[Path | None, typer.Option("--dir", help="Folder of runs; default: runs.")]
Name = Annotated[str | None, typer.Option("--name", help="Run name; default: the recipe and the time.")]
NumNodes = Annotated[int | None, typer.Option("--num-nodes", min=1, help="Nodes; default: the recipe's.")]
NumGpus = Annotated[
    int | None,
    typer.Option(
        "--num-gpus-per-node", "--nproc-per-node", min=1, help="Processes per node, one per GPU; default: the recipe's."
    ),
]
Precision = Annotated[str | None, typer.Option("--precision", help="bf16, fp8, or fp32 for mixtral_tiny.")]
Hardware = Annotated[str | None, typer.Option("--hardware", help="Whose layout to take: h100, h200, b200 or gb200.")]
Executor = Annotated[
    ExecutorName, typer.Option("--executor", help="This process, local processes (torchrun), or a Slurm cluster.")
]
Cluster = Annotated[str | None, typer.Option("--cluster", help="Slurm: a profile of clusters.toml.")]
Account = Annotated[str | None, typer.Option("--account", help="Slurm: account; default: the profile's.")]
Partition = Annotated[str | None, typer.Option("--partition", help="Slurm: partition; default: the profile's.")]
Time = Annotated[
    str | None, typer.Option("--time", help="Slurm: time limit of one attempt, HH:MM:SS; a longer job comes back.")
]
Retries = Annotated[
    int | None, typer.Option("--retries", min=0, help="Slurm: restarts after a failure; preemptions are not counted.")
]
SlurmSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm", metavar="KEY=VALUE", help="Any other setting of a cluster profile, e.g. --slurm env.NCCL_DEBUG=INFO."
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="Slurm: return once the job is queued.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve and check everything, and run nothing.")]
Yaml = Annotated[Path | None, typer.Option("--yaml", help="Run the recipe in this file.")]
ToYaml = Annotated[Path | None, typer.Option("--to-yaml", help="Write the resolved recipe to this file, run nothing.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Export = Annotated[
    bool | None,
    typer.Option("--export/--no-export", help="Export the trained model; default: mixtral_tiny's only."),
]
Evaluate = Annotated[
    int, typer.Option("--evaluate", min=0, help="Held-out questions to answer before and after, when exporting.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH=VALUE",
        help="Settings to change, e.g. trainer.max_steps=20.",
        autocompletion=complete_override,
    ),
]
