"""``mixtral-recipes run FILE``: a recipe written in YAML."""

from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.jobs.choose import JobOptions
from mixtral_recipes.cli.jobs.launch import run_job
from mixtral_recipes.cli.options.groups import argument
from mixtral_recipes.cli.options.place import PlaceOptions
from mixtral_recipes.cli.options.recipe import Overrides, RecipeOptions
from mixtral_recipes.cli.options.result import AfterTrainingOptions, JobResultOptions


def command(
    *,
    file: Annotated[Path, argument("FILE", "A recipe file; examples/ has some to start from.")],
    overrides: Overrides = None,
    place: PlaceOptions,
    after: AfterTrainingOptions,
    result: JobResultOptions,
) -> None:
    """Run a recipe written in a YAML file."""
    run_job(JobOptions(None, RecipeOptions(yaml=file), place, result, overrides or []), after)
