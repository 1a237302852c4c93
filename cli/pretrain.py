"""``mixtral-recipes pretrain``."""

from mixtral_recipes.cli.jobs.choose import JobOptions
from mixtral_recipes.cli.jobs.launch import run_job
from mixtral_recipes.cli.options.place import PlaceOptions
from mixtral_recipes.cli.options.recipe import Overrides, PretrainingOptions, RecipeOptions
from mixtral_recipes.cli.options.result import JobResultOptions


def command(
    *,
    overrides: Overrides = None,
    chosen: RecipeOptions,
    pretraining: PretrainingOptions,
    place: PlaceOptions,
    result: JobResultOptions,
) -> None:
    """Train a model from random weights."""
    run_job(JobOptions("pretrain", chosen, place, result, overrides or [], pretraining=pretraining))
