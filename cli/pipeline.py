"""``mixtral-recipes pipeline FILE``: several jobs that depend on each other, submitted at once."""

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.groups import argument, option
from mixtral_recipes.cli.options.place import Detach
from mixtral_recipes.cli.options.result import DryRun, Json
from mixtral_recipes.cli.output import note, print_json, say


class Where(enum.StrEnum):
    """Where a pipeline runs."""

    local = "local"
    slurm = "slurm"


def command(
    *,
    file: Annotated[Path, argument("FILE", "Pipeline file (TOML); see docs/guide/clusters.md.")],
    executor: Annotated[
        Where, option("--executor WHERE", "local (here, one stage after another) or slurm (dependent jobs).")
    ] = Where.local,
    start: Annotated[str | None, option("--from STAGE", "Start with this stage, skipping those before it.")] = None,
    detach: Detach = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run several jobs that depend on each other.

    A stage is a recipe to train, or a command of this program, such as import, evaluate or export.
    """
    from mixtral_recipes.cli.main import check_words
    from mixtral_recipes.errors import LaunchError
    from mixtral_recipes.executors import pipeline as pipelines

    if detach and executor is not Where.slurm:
        raise LaunchError(f"--detach has no effect with --executor {executor}; use --executor slurm.")
    pipeline = pipelines.read(file)
    if start is not None:
        pipeline = pipeline.starting_with(start)
    for stage in pipeline.stages:
        with _named(stage):
            if stage.command:
                check_words(list(stage.command))
    result: dict[str, Any] = {"pipeline": pipeline.name, "stages": [stage.name for stage in pipeline.stages]}
    if executor is Where.slurm:
        stages, scripts = pipelines.submit(pipeline, recipe_of, dry_run=dry_run)
        if dry_run:
            for stage, script in zip(stages, scripts, strict=True):
                say(f"# stage {stage.stage}, after: {', '.join(stage.depends_on) or 'nothing'}\n{script}")
        else:
            result["jobs"] = {stage.stage: stage.job_id for stage in stages}
            result["runs"] = {stage.stage: stage.id for stage in stages}
            if detach:
                for stage in stages:
                    note(f"stage {stage.stage}: Slurm job {stage.job_id}, run {stage.id}")
            else:
                pipelines.watch(stages)
    elif dry_run:
        for stage in pipeline.stages:
            if stage.recipe:
                recipe_of(pipeline, stage)
            say(f"{stage.name}: {' '.join(stage.command) or f'{stage.task} {stage.recipe}'}")
    else:
        result["results"] = pipelines.run_local(pipeline, recipe_of)
    if json:
        print_json(result)


def recipe_of(pipeline: Any, stage: Any) -> Any:
    """A stage's recipe, changed, checked, and with its run folder set.

    Raises:
        LaunchError: it cannot run; names the stage.
    """
    from mixtral_recipes.executors.preflight import preflight
    from mixtral_recipes.overrides import paths as overrides
    from mixtral_recipes.overrides.loading import load

    with _named(stage):
        recipe = load(stage.recipe, stage.task, **stage.arguments)
        overrides.apply(recipe, list(stage.overrides))
        recipe.log.log_dir, recipe.log.name = str(pipeline.dir), stage.name
        preflight(recipe, stage.arguments.get("hardware", "h100"), elsewhere=True)
    return recipe


@contextlib.contextmanager
def _named(stage: Any) -> Iterator[None]:
    """Say in an error which stage it is about."""
    from mixtral_recipes.errors import LaunchError, MixtralRecipesError

    try:
        yield
    except MixtralRecipesError as error:
        raise LaunchError(f"stage {stage.name!r}: {error}") from error
