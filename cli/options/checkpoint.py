"""A checkpoint on the command line, and what import and export offer alike."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.cli.options.runs import complete_run

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint folder or nemo://ID; or a run's name, id or folder: its newest whole checkpoint.",
        autocompletion=complete_run,
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="bf16, fp16 or fp32; default: the type it has.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload the finished folder to this Hub repository."),
]
Public = Annotated[bool, typer.Option("--public", help="If a repository is created: make it public.")]


def checkpoint_folder(text: str) -> Path:
    """The folder a CHECKPOINT names; a run's newest whole checkpoint is said on stderr.

    Raises:
        CheckpointError: there is no such checkpoint, or the run has no whole one.
        LaunchError: it is neither a checkpoint nor a run.
    """
    from mixtral_recipes.cli.output import note
    from mixtral_recipes.executors.runs.records import run_folder
    from mixtral_recipes.importers import locations

    if "://" in text or _is_checkpoint(Path(text).expanduser()):
        return locations.checkpoint(text)
    from mixtral_recipes.checkpoints.load import find_checkpoint
    ...
