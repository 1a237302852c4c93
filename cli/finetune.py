"""``mixtral-recipes finetune``: train, export, and answer held-out questions before and after."""

from mixtral_recipes.cli.jobs.choose import JobOptions
from mixtral_recipes.cli.jobs.launch import run_job
from mixtral_recipes.cli.options.place import PlaceOptions
from mixtral_recipes.cli.options.recipe import FineTuningOptions, Overrides, RecipeOptions
from mixtral_recipes.cli.options.result import AfterTrainingOptions, JobResultOptions


def command(
    *,
    overrides: Overrides = None,
    chosen: RecipeOptions,
    tuning: FineTuningOptions,
    place: PlaceOptions,
    after: AfterTrainingOptions,
    result: JobResultOptions,
) -> None:
    """Fine-tune a checkpoint with LoRA, DoRA, QLoRA, or all weights."""
    run_job(JobOptions("finetune", chosen, place, result, overrides or [], tuning=tuning), after)
