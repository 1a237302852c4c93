"""The command line's one way to run a recipe: here, in local processes, or on Slurm."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.local import run_processes
from mixtral_recipes.executors.names import check_name
from mixtral_recipes.executors.runs import records, states
from mixtral_recipes.executors.slurm import status
from mixtral_recipes.executors.stored import RANK_MODULE, load_recipe, store

if TYPE_CHECKING:
    import nemo_run as run


def launch(
    recipe: Any,
    *,
    executor: "str | run.Executor",
    name: str,
    run_dir: Path,
    dry_run: bool = False,
    detach: bool = False,
) -> dict[str, Any]:
    """Run ``recipe`` and return what it wrote to RUN/result.json.

    Args:
        recipe: A run.Partial of ``mixtral_recipes.api.pretrain`` or ``finetune``.
        executor: "direct" (called in this process), "local" (torchrun, as many processes as ``recipe.trainer`` asks
            for), or a nemo_run SlurmExecutor.
        name: Run name; see :func:`mixtral_recipes.executors.names.check_name`.
        run_dir: The run folder, ``recipe.log.log_dir / recipe.log.name``.
        dry_run: Print what would run, and run nothing.
        detach: Return after submitting (Slurm only).

    Returns:
        The result; for a detached job ``{"run": id, "job_id": ...}``; for a dry run ``{"dry_run": True, ...}``.

    Raises:
        LaunchError: it could not be started, or a rank failed (the message names the rank and its error).
        Preempted: it was asked to stop, saved, and can be started again.
    """
    check_name(name)
    if executor == "direct":
        return _direct(recipe, Path(run_dir), dry_run)
    if executor == "local":
        return _local(recipe, name, Path(run_dir), dry_run)
    import nemo_run as run

    if isinstance(executor, run.SlurmExecutor):
        return _slurm(recipe, executor, name, Path(run_dir), dry_run, detach)
    raise LaunchError(f"executor {executor!r} is not supported; use direct, local or a run.SlurmExecutor.")


def size(recipe: Any) -> tuple[int, int]:
    """Nodes and processes per node that ``recipe.trainer`` asks for; 1 and 1 for a task without a trainer."""
    trainer = getattr(recipe, "trainer", None)
    return int(getattr(trainer, "num_nodes", 1) or 1), int(getattr(trainer, "devices", 1) or 1)


def _direct(recipe: Any, run_dir: Path, dry_run: bool) -> dict[str, Any]:
    import fiddle as fdl

    if dry_run:
        return _shown(recipe, "this process", {"executor": "direct", "run_dir": str(run_dir)})
    started = time.time()
    fdl.build(recipe)()
    return _result(run_dir, records.newest_in(run_dir, since=started), started)


def _local(recipe: Any, name: str, run_dir: Path, dry_run: bool) -> dict[str, Any]:
    nodes, processes = size(recipe)
    if nodes != 1:
        raise LaunchError(f"num_nodes={nodes} does not work with --executor local; use 1, or --executor slurm.")
    record = records.new(name, run_dir, "local", _called(recipe))
    record.nproc_per_node = processes
    record.job_dir = str(record.path.parent)
    recipe_file = Path(record.job_dir, "recipe.json")
    if dry_run:
        line = f"torchrun --nproc-per-node {processes} -m {RANK_MODULE} {recipe_file}"
        return _shown(recipe, line, {"executor": "local", "run_dir": str(run_dir), "command": line})
    with records.locked(run_dir):
        record.save()
        store(recipe, recipe_file)
        run_processes(recipe_file, record)
    return _result(run_dir, record, record.created)


def _slurm(
    recipe: Any, executor: "run.SlurmExecutor", name: str, run_dir: Path, dry_run: bool, detach: bool
) -> dict[str, Any]:
    from mixtral_recipes.executors.slurm.executor import with_full_paths
    from mixtral_recipes.executors.submit import Task, submit, watch

    record = records.new(name, run_dir, "slurm", _called(recipe))
    (script,) = submit([Task(executor, record, recipe)], name, dry_run=dry_run)
    described = {"run": record.id, "job_id": record.job_id, "run_dir": str(run_dir)}
    if dry_run:
        settings: Any = executor.job_details
        placed = with_full_paths(recipe, settings.profile())
        return _shown(placed, script, {"executor": "slurm", "run_dir": str(run_dir), "script": script})
    result = None if detach else watch(record)
    return described if result is None else result | described


def _shown(recipe: Any, what: str, described: dict[str, Any]) -> dict[str, Any]:
    """Print the resolved recipe, its layout and exactly what would run; return ``described`` as a dry run's result."""
    from nemo_run.core.serialization.yaml import YamlSerializer

    nodes, processes = size(recipe)
    print(f"# recipe\n{YamlSerializer().serialize(recipe).rstrip()}\n")
    print(f"# layout: {nodes} node(s) x {processes} process(es) = {nodes * processes} rank(s)\n\n# would run\n{what}")
    return {"dry_run": True, **described}


def _called(recipe: Any) -> str:
    return getattr(getattr(recipe, "__fn_or_cls__", None), "__name__", "")


def _result(run_dir: Path, record: records.RunRecord | None, started: float) -> dict[str, Any]:
    """RUN/result.json of this run; a run that wrote none reports only its id."""
    return (records.result(run_dir, since=started - 1) or {}) | ({"run": record.id} if record else {})


def restart(record: records.RunRecord) -> dict[str, Any]:
    """Start a local run's stored recipe again, in the same run folder, under a new id; return its result.

    Raises:
        LaunchError: it has not ended, or was started from Python without storing its recipe.
    """
    now = states.state(record)
    if now.state not in status.FINAL:
        raise LaunchError(f"run {record.id} has not ended ({now.state}); cancel it first.")
    stored = Path(record.job_dir or record.path.parent, "recipe.json")
    if record.executor != "local" or not stored.exists():
        raise LaunchError(
            f"run {record.id} ({record.executor}) has no stored recipe; repeat its command, or run its script again."
        )
    return launch(load_recipe(stored), executor="local", name=record.name, run_dir=Path(record.run_dir))
