"""Submit recipes and commands to Slurm through one nemo_run experiment, and on request watch them to their end."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.names import check_name
from mixtral_recipes.executors.own_modules import with_own_modules
from mixtral_recipes.executors.runs import logs, records
from mixtral_recipes.executors.runs import states as runs
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.executors.slurm.executor import check_files_there, for_recipe, with_full_paths
from mixtral_recipes.executors.slurm.status import FINAL, JobState, one_line
from mixtral_recipes.executors.stored import RANK_MODULE, store
from mixtral_recipes.system.files import private_folder, temporary_folder
from mixtral_recipes.system.home import jobs_home

if TYPE_CHECKING:
    import nemo_run as run

RECIPE_IN_JOB = "/nemo_run/configs/recipe.json"  # nemo_run's word for the job folder
CLI_MODULE = "mixtral_recipes.cli.main"


@dataclass
class Task:
    """One job to submit: a recipe under torchrun, or a mixtral-recipes command in one plain process."""

    executor: "run.SlurmExecutor"
    record: RunRecord
    recipe: Any = None
    command: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # names of earlier tasks that must have succeeded


def submit(tasks: list[Task], title: str, *, dry_run: bool = False) -> list[str]:
    """Submit all tasks and complete their records; return their sbatch scripts.

    Raises:
        LaunchError: another unfinished run uses a folder, a path is not allowed, or sbatch refuses a job.
    """
    check_name(title)
    for task in tasks:
        refuse_shared_folder(task.record)
    if dry_run:
        return _rehearse(tasks, title)
    for task in tasks:
        if task.recipe is not None and not task.after:  # the earlier ones may make its files
            check_files_there(task.executor, _placed(task))
    home = use_jobs_home()
    prepared = [_prepare(task, task.record.path.parent) for task in tasks]
    experiment = _experiment(title, prepared[0][0], home)
    try:
        with experiment:
            for task, (executor, script) in zip(tasks, prepared, strict=True):
                experiment.add(script, executor, name=check_name(task.record.name), dependencies=list(task.after))
            jobs: list[Any] = [job.executor for job in experiment.jobs]
            experiment.run(detach=True)
            handles = [str(getattr(job, "handle", "")) for job in experiment.jobs]
            for task, handle in zip(tasks, handles, strict=True):
                task.record.job_id = handle.rpartition("/")[2]
    except Exception as error:
        settings: Any = tasks[0].executor.job_details
        site = settings.profile()
        for job in experiment.jobs:  # those that were queued before the one that was refused
            if handle := str(getattr(job, "handle", "")):
                slurm_status.slurm(["scancel", handle.rpartition("/")[2]], site.login)
        forget_secrets([job.executor for job in experiment.jobs], error)
        if isinstance(error, LaunchError):
            raise
        why = getattr(getattr(error, "result", error), "stderr", "") or getattr(error, "strerror", "") or str(error)
        through = f" through {site.ssh}" if site.ssh else ""
        raise LaunchError(f"the job was not submitted{through}: {one_line(why)}.") from error
    for task, job in zip(tasks, jobs, strict=True):
        complete(task.record, job)
    return [Path(job.job_dir, "sbatch.sh").read_text() for job in jobs]


def forget_secrets(executors: list[Any], error: Exception) -> None:
    """Remove the secrets of jobs that will not run, here and on a login node.

    Args:
        executors: Each job's own `slurm_executor`.
        error: Why they will not run; after a LaunchError a login node is not asked: it may be what cannot be entered.
    """
    for executor in executors:
        Path(executor.job_dir, "secrets.env").unlink(missing_ok=True)
        node = executor.job_details.profile().login
        if node and not isinstance(error, LaunchError):
            slurm_status.slurm(["rm", "-f", f"{_folder_there(executor)}/secrets.env"], node)


def _folder_there(executor: Any) -> str:
    return os.path.join(executor.tunnel.job_dir, Path(executor.job_dir).name)


def _rehearse(tasks: list[Task], title: str) -> list[str]:
    """The scripts of jobs that are not submitted. They are written to a folder that goes again, and without secrets."""
    with temporary_folder() as folder:
        home = use_jobs_home(folder)
        prepared = [_prepare(task, home / task.record.id) for task in tasks]
        experiment = _experiment(title, prepared[0][0], home)
        with experiment:
            for task, (executor, script) in zip(tasks, prepared, strict=True):
                executor.job_details.rehearsal = True  # pyright: ignore[reportAttributeAccessIssue]
                experiment.add(script, executor, name=check_name(task.record.name), dependencies=list(task.after))
            experiment.dryrun(log=False, delete_exp_dir=False)
            scripts = [Path(job.executor.job_dir, "sbatch.sh").read_text() for job in experiment.jobs]
    return [script.replace(str(home), str(jobs_home())) for script in scripts]


def use_jobs_home(folder: Path | None = None) -> Path:
    """Point nemo_run at `jobs_home` or another folder; it read NEMORUN_HOME when a recipe imported it.

    Returns:
        The folder.
    """
    from nemo_run.config import set_nemorun_home
    from nemo_run.run.torchx_backend.schedulers import slurm

    folder = private_folder(folder or jobs_home())
    set_nemorun_home(str(folder))
    slurm.SLURM_JOB_DIRS = str(folder / ".slurm_jobs")
    return folder


def _experiment(title: str, executor: "run.SlurmExecutor", home: Path) -> "run.Experiment":
    import nemo_run as run

    return run.Experiment(
        title, executor=executor, log_level="ERROR", base_dir=str(home), clean_mode=True,
        enable_goodbye_message=False, skip_status_at_exit=True, serialize_metadata_for_scripts=False,
    )  # fmt: skip


def _prepare(task: Task, folder: Path) -> "tuple[run.SlurmExecutor, run.Script]":
    """The executor with this job's settings, and what it starts.

    Args:
        task: The job.
        folder: Where its recipe is stored.
    """
    import nemo_run as run

    executor = task.executor.clone()
    settings: Any = executor.job_details
    for_recipe(executor, task.recipe, Path(task.record.run_dir).parent, task.command)
    if task.command:
        settings.torchrun = False
        return executor, run.Script(CLI_MODULE, args=list(task.command), entrypoint="python", m=True)
    settings.recipe_file = str(folder / "recipe.json")
    store(_placed(task), Path(settings.recipe_file))
    executor = with_own_modules(executor, task.recipe)
    return executor, run.Script(RANK_MODULE, args=[RECIPE_IN_JOB], entrypoint="python", m=True)


def _placed(task: Task) -> Any:
    settings: Any = task.executor.job_details
    return with_full_paths(task.recipe, settings.profile())


def complete(record: RunRecord, job: Any) -> None:
    """Write down where a submitted job is.

    Args:
        record: The record, with its job id.
        job: The job's own `slurm_executor`.
    """
    from nemo_run.core.tunnel.client import SSHTunnel

    from mixtral_recipes.executors.slurm.tunnel import address

    record.job_dir = job.job_dir
    record.nodes, record.nproc_per_node = job.nnodes(), job.job_details.nproc_per_node
    record.cluster = job.job_details.cluster.get("name", "")
    record.secrets = list(job.job_details.cluster.get("secrets", ()))
    record.env_file = job.job_details.cluster.get("env_file") or ""
    if isinstance(job.tunnel, SSHTunnel):
        record.ssh = address(job.tunnel)
        record.remote_dir = _folder_there(job)
        Path(job.job_dir, "secrets.env").unlink(missing_ok=True)  # it is over there now
    record.save()


def watch(record: RunRecord) -> dict[str, Any] | None:
    """Show rank 0's lines until the job ends; Ctrl-C stops watching and leaves the job alone.

    Returns:
        RUN/result.json, or None if the user stopped watching.

    Raises:
        LaunchError: the job failed or was cancelled.
    """
    watched = runs.Watched(record)
    try:
        for line in logs.follow(record, 0, watched.ended):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"job {record.job_id} continues; see `mixtral-recipes runs logs -f {record.id}`", file=sys.stderr)
        return None
    if watched.state.state != "succeeded":
        raise LaunchError(how_it_ended(record, watched.state))
    return runs.result(record) or {}


def how_it_ended(record: RunRecord, state: JobState) -> str:
    """One line on a job that did not succeed: the error of its first failed rank, or else what Slurm says."""
    runs.fetch(record)
    failed = logs.failure(record)
    reason = failed[0] if failed else state.detail or "no rank reported an error"
    return f"job {record.job_id} {state.state}: {reason} (`mixtral-recipes runs logs {record.id}`)."


def refuse_shared_folder(record: RunRecord) -> None:
    """Raise if an unfinished Slurm run writes to the same folder; rank 0 also locks it while it runs.

    Raises:
        LaunchError: naming the other run.
    """
    others = [r for r in records.all_records() if r.run_dir == record.run_dir and r.id != record.id]
    for run_id, state in runs.states([r for r in others if r.executor == "slurm" and r.job_id]).items():
        if state.state not in FINAL:
            raise LaunchError(
                f"run folder {record.run_dir} belongs to run {run_id}, which has not ended ({state.state}); "
                f"choose another --name or --dir, or `mixtral-recipes runs cancel {run_id}`."
            )
