"""A checkpoint on the command line, and what import and export offer alike."""

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
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The model that adapters adapt, if it is not where they say."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there, if it is of the same kind and holds nothing else."),
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload the finished folder to this Hub repository."),
]
Public = Annotated[bool, typer.Option("--public", help="If the repository is created, make it public.")]
