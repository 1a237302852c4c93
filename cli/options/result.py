"""What a command produces: its result as JSON, a recipe file instead of a run, the trained model."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.groups import field, option

_output = functools.partial(option, rich_help_panel="Output")
_after = functools.partial(field, rich_help_panel="After training")

Json = Annotated[bool, _output("--json", "End with one JSON object on stdout.")]
DryRun = Annotated[bool, _output("--dry-run", "Check everything, show what would run, and run nothing.")]


@dataclass
class JobResultOptions:
    """What a job should produce: a run, a recipe file, or only an answer."""

    dry_run: DryRun = False
    to_yaml: Annotated[Path | None, _output("--to-yaml FILE", "Write the resolved recipe there, and run nothing.")] = (
        None
    )
    json: Json = False


@dataclass
class AfterTrainingOptions:
    """What follows fine-tuning."""

    export: bool | None = _after("--export/--no-export", "Export the trained model; default: mixtral_tiny's only.")
    evaluate: int | None = _after("--evaluate N", "Held-out questions to answer before and after; default: 100.", min=0)
