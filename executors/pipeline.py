"""Several jobs that depend on each other, as one experiment: import -> finetune -> export -> evaluate."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from mixtral_recipes.errors import LaunchError, MixtralRecipesError, Preempted, nearest
from mixtral_recipes.executors.names import check_name, check_no_password
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs
from mixtral_recipes.executors.slurm.status import FINAL
from mixtral_recipes.system.schema import typed
from mixtral_recipes.system.toml_files import read_table
from mixtral_recipes.training.guards.signals import stops_handled_by

_STOPPED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}  # of a command without a save


@dataclass
class Stage:
    """One table of a pipeline file: a mixtral-recipes ``command``, or a ``recipe`` to train.

    ``after`` names the stages that must have succeeded; left out, it is the stage before.
    """

    name: str
    command: tuple[str, ...] = ()
    recipe: str = ""
    task: Literal["finetune", "pretrain"] = "finetune"
    overrides: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)  # of the recipe function: {"num_nodes": 2}
    after: tuple[str, ...] = ()
    slurm: dict[str, Any] = field(default_factory=dict)  # settings over the cluster profile's


class _File(TypedDict, total=False):
    """A pipeline file as it is written."""

    name: str
    dir: str
    cluster: str
    slurm: dict[str, Any]
    stage: list[dict[str, Any]]


@dataclass
class Pipeline:
    """A pipeline file."""

    name: str
    dir: Path
    cluster: str | None
    slurm: dict[str, Any]
    stages: list[Stage]

    def starting_with(self, name: str) -> "Pipeline":
        """The same without the stages in front of one: they have succeeded before.

        Raises:
            LaunchError: there is no such stage.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise LaunchError(f"--from {name}: pipeline {self.name!r} has no stage of this name.{nearest(name, names)}")
        rest = self.stages[names.index(name) :]
        left = {stage.name for stage in rest}
        stages = [replace(stage, after=tuple(name for name in stage.after if name in left)) for stage in rest]
        return replace(self, stages=stages)


type RecipeOf = Callable[[Pipeline, Stage], Any]


def read(path: Path) -> Pipeline:
    """Read and check a pipeline file (TOML).

    Raises:
        LaunchError: no such file, not TOML, an unknown key, or a stage that depends on one not before it.
    """
    table = read_table(path, LaunchError)
    _known(table, tuple(_File.__annotations__), str(path))
    typed(table, _File, path, LaunchError)
    stages: list[Stage] = []
    for entry in table.get("stage", []):
        where = f"{path}: stage {entry.get('name', len(stages) + 1)!r}"
        _known(entry, tuple(field.name for field in fields(Stage)), where)
        earlier = [stage.name for stage in stages]
        stage = typed({"after": earlier[-1:], **entry}, Stage, where, LaunchError)
        check_name(stage.name, f"{path}: stage name")
        if bool(stage.command) == bool(stage.recipe):
            raise LaunchError(f"{where} needs either command or recipe.")
        check_no_password(" ".join(stage.command), f"{where}: command")
        for name in stage.after:
            if name not in earlier:
                raise LaunchError(
                    f"{where} comes after {name!r}, which is not an earlier stage.{nearest(name, earlier)}"
                )
        if stage.name in earlier:
            raise LaunchError(f"{where} has the name of an earlier stage.")
        stages.append(stage)
    if not stages:
        raise LaunchError(f"{path} has no [[stage]].")
    name = check_name(table.get("name", path.stem), "pipeline name")
    return Pipeline(name, Path(table.get("dir", "runs")), table.get("cluster"), table.get("slurm", {}), stages)


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise LaunchError(f"{where} has an unknown key {key!r}.{nearest(key, keys)}")


def run_local(pipeline: Pipeline, recipe_of: RecipeOf) -> dict[str, Any]:
    """Run the stages one after the other on this machine.

    Args:
        pipeline: The stages.
        recipe_of: Makes a stage's recipe.

    Raises:
        MixtralRecipesError: a recipe cannot run; no stage was started.
        LaunchError: a stage failed; the message names it and those that were not started.
        Preempted: a stage was stopped, and saved first; the message names the same.
    """
    results: dict[str, Any] = {}
    pipeline = replace(pipeline, dir=pipeline.dir.expanduser().absolute())
    recipes = {stage.name: recipe_of(pipeline, stage) for stage in pipeline.stages if stage.recipe}
    for number, stage in enumerate(pipeline.stages):
        print(f"== stage {stage.name}", file=sys.stderr, flush=True)
        try:
            results[stage.name] = _run_stage(pipeline, stage, recipes.get(stage.name))
        except Preempted as stop:
            told = Preempted(f"stage {stage.name!r} was stopped: {stop}{_skipped(pipeline, number)}")
            told.exit_code = told.code = stop.exit_code
            raise told from stop
        except MixtralRecipesError as error:
            raise LaunchError(f"stage {stage.name!r} failed: {error}{_skipped(pipeline, number)}") from error
    return results


def _run_stage(pipeline: Pipeline, stage: Stage, recipe: Any) -> dict[str, Any]:
    if stage.command:
        return _run_command(stage.command)
    from mixtral_recipes.executors.launch import launch

    return launch(recipe, executor="local", name=stage.name, run_dir=pipeline.dir / stage.name)


def _run_command(words: tuple[str, ...]) -> dict[str, Any]:
    """Run a command of this program and show what it says; with ``--json``, its result.

    Signals that stop a command are passed on to it. It stands in a session of its own: Ctrl-C reaches it once.
    """
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", *words]
    last = ""
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process,
        stops_handled_by(lambda number, _frame: process.send_signal(number)),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
        process.wait()
    if process.returncode == Preempted.exit_code:
        raise Preempted(f"`mixtral-recipes {words[0]}` saved.")
    if process.returncode in _STOPPED:
        stop = Preempted(f"`mixtral-recipes {words[0]}` did not finish.")
        stop.exit_code = stop.code = process.returncode
        raise stop
    if process.returncode != 0:
        raise LaunchError(f"`mixtral-recipes {words[0]}` ended with exit code {process.returncode}.")
    return json.loads(last) if "--json" in words else {}


def _skipped(pipeline: Pipeline, number: int) -> str:
    """Of the stages behind one that did not succeed, and how to go on."""
    names = [stage.name for stage in pipeline.stages]
    rest = f" Not started: {', '.join(names[number + 1 :])}." if names[number + 1 :] else ""
    return f"{rest} Continue with --from {names[number]}."


def submit(
    pipeline: Pipeline, recipe_of: RecipeOf, *, dry_run: bool = False
) -> "tuple[list[records.RunRecord], list[str]]":
    """Submit every stage at once, each waiting for those it comes after.

    Args:
        pipeline: The stages.
        recipe_of: Makes a stage's recipe.
        dry_run: Whether only the scripts are written.

    Returns:
        The records of the stages, and their sbatch scripts.

    Raises:
        LaunchError: a setting that is not allowed, or sbatch refuses a stage; nothing stays queued then.
    """
    from mixtral_recipes.executors.launch import size
    from mixtral_recipes.executors.slurm.executor import slurm_executor
    from mixtral_recipes.executors.slurm.profile import cluster
    from mixtral_recipes.executors.submit import Task
    from mixtral_recipes.executors.submit import submit as submit_tasks

    tasks = []
    pipeline = replace(pipeline, dir=cluster(pipeline.cluster, **pipeline.slurm).folder(pipeline.dir))
    for stage in pipeline.stages:
        recipe = recipe_of(pipeline, stage) if stage.recipe else None
        executor = slurm_executor(*size(recipe), cluster_name=pipeline.cluster, **(pipeline.slurm | stage.slurm))
        record = records.new(f"{pipeline.name}-{stage.name}", pipeline.dir / stage.name, "slurm", stage.recipe)
        record.name = record.stage = stage.name
        record.pipeline, record.depends_on = pipeline.name, list(stage.after)
        tasks.append(Task(executor, record, recipe=recipe, command=stage.command, after=stage.after))
    return [task.record for task in tasks], submit_tasks(tasks, pipeline.name, dry_run=dry_run)


def watch(stages: list[records.RunRecord], poll_s: float = 1.0) -> None:
    """Print each stage's state as it changes; when one fails, cancel the stages that wait for it.

    Ctrl-C stops watching and leaves the jobs alone.

    Raises:
        LaunchError: naming the stage that failed, its error, and what was not run.
    """
    try:
        _watch(stages, poll_s)
    except KeyboardInterrupt:
        print("the jobs continue; see `mixtral-recipes runs list`", file=sys.stderr)


def _watch(stages: list[records.RunRecord], poll_s: float) -> None:
    from mixtral_recipes.executors.submit import how_it_ended

    told: dict[str, str] = {}
    while True:
        states = runs.states(stages)
        for record in stages:
            state = states[record.id].state
            if told.get(record.id) != state:
                print(f"stage {record.stage}: {state} (job {record.job_id})", file=sys.stderr, flush=True)
                told[record.id] = state
        bad = [record for record in stages if told[record.id] in FINAL and told[record.id] != "succeeded"]
        if bad:
            waiting = [record for record in stages if told[record.id] not in FINAL]
            for record in waiting:
                with contextlib.suppress(LaunchError):  # Slurm may have done it by now
                    runs.cancel(record)
            stopped = [r.stage for r in stages if r is not bad[0] and told[r.id] != "succeeded"]
            rest = f" Not run: {', '.join(stopped)}." if stopped else ""
            reason = how_it_ended(bad[0], states[bad[0].id])
            raise LaunchError(f"stage {bad[0].stage!r} failed: {reason}{rest} Continue with --from {bad[0].stage}.")
        if all(state == "succeeded" for state in told.values()):
            return
        time.sleep(max(poll_s, 5 if any(record.ssh for record in stages) else 0))
