"""mixtral-recipes pipeline FILE: several jobs that depend on each other, submitted at once."""

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer


class Where(enum.StrEnum):
    """Where a pipeline runs."""

    local = "local"
    slurm = "slurm"


def command(
    file: Annotated[Path, typer.Argument(help="Pipeline file (TOML); see docs/clusters.md.")],
    executor: Annotated[Where, typer.Option(help="Here, one stage after the other, or as Slurm jobs.")] = Where.local,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the stages are queued (Slurm).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Run import, fine-tuning, export and evaluation as stages of one experiment."""
    from mixtral_recipes.executors import pipeline as pipelines

    pipeline = pipelines.read(file)
    result: dict[str, Any] = {"pipeline": pipeline.name, "stages": [stage.name for stage in pipeline.stages]}
    if executor is Where.slurm:
        stages, scripts = pipelines.submit(pipeline, dry_run=dry_run)
        if dry_run:
            for stage, script in zip(stages, scripts, strict=True):
                print(f"# stage {stage.stage}, after: {', '.join(stage.depends_on) or 'nothing'}\n{script}")
        else:
            result["jobs"] = {stage.stage: stage.job_id for stage in stages}
            result["runs"] = {stage.stage: stage.id for stage in stages}
            if not detach:
                pipelines.watch(stages)
    elif dry_run:
        for stage in pipeline.stages:
            print(f"{stage.name}: {' '.join(stage.command) or f'{stage.task} {stage.recipe}'}")
    else:
        result["results"] = pipelines.run_local(pipeline)
    if as_json:
        print(json.dumps(result, default=str))
