"""What a command produces: its result as JSON, a recipe file instead of a run, the trained model."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

option = functools.partial(typer.Option, rich_help_panel="Output")
after_option = functools.partial(typer.Option, rich_help_panel="After training")

Json = Annotated[bool, option("--json", help="End with one JSON object on stdout.")]
DryRun = Annotated[bool, option("--dry-run", help="Check everything, show what would run, and run nothing.")]


@dataclass
class JobResultOptions:
    """What a job should produce: a run, a recipe file, or only an answer."""

    dry_run: DryRun = False
    to_yaml: Annotated[
        Path | None, option("--to-yaml", metavar="FILE", help="Write the resolved recipe there, and run nothing.")
    ] = None
    json: Json = False


@dataclass
class AfterTrainingOptions:
    """What follows fine-tuning."""

    export: Annotated[
        bool | None,
        after_option("--export/--no-export", help="Export the trained model; default: mixtral_tiny's only."),
    ] = None
    evaluate: Annotated[
        int,
        after_option(
            "--evaluate", metavar="N", min=0, help="Held-out questions to answer before and after, when exporting."
        ),
    ] = 100
