"""Submit a recipe to Slurm through nemo_run, and on request watch it to its end."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors import logs, records, runs
from mixtral_recipes.executors.names import check_path, jobs_home
from mixtral_recipes.executors.records import RunRecord
from mixtral_recipes.executors.slurm_status import FINAL

if TYPE_CHECKING:
    import nemo_run as run

RECIPE_IN_JOB = "/nemo_run/configs/recipe.json"  # nemo_run's word for the job folder


def submit(
    recipe: Any, executor: "run.SlurmExecutor", record: RunRecord, recipe_file: Path, *, dry_run: bool = False
) -> str:
    """Submit one job and complete ``record``; return the sbatch script.

    A recipe for GPUs asks for as many as it has ranks per node, unless the profile says otherwise (0 asks for none).

    Raises:
        LaunchError: another unfinished run uses the folder, a path is not allowed, or sbatch refuses the job.
    """
    import nemo_run as run
    from nemo_run.config import set_nemorun_home

    from mixtral_recipes.executors.launch import RANK_MODULE

    settings = executor.job_details
    refuse_shared_folder(record)
    set_nemorun_home(str(records.private_folder(jobs_home())))
    executor = executor.clone()
    executor.job_details.recipe_file = str(recipe_file)  # type: ignore[attr-defined]
    executor.job_details.folders = [check_path(Path(record.run_dir).parent, "output folder")]  # type: ignore[attr-defined]
    trainer = getattr(recipe, "trainer", None)
    if getattr(trainer, "accelerator", "") == "gpu" and settings.cluster.get("gpus_per_node") is None:  # type: ignore[attr-defined]
        executor.job_details.cluster["gpus_per_node"] = settings.nproc_per_node  # type: ignore[attr-defined]
    task = run.Script(RANK_MODULE, args=[RECIPE_IN_JOB], entrypoint="python", m=True)
    try:
        with run.Experiment(
            record.name, executor=executor, log_level="ERROR", base_dir=str(jobs_home()), clean_mode=True,
            enable_goodbye_message=False, skip_status_at_exit=True, serialize_metadata_for_scripts=False,
        ) as experiment:  # fmt: skip
            experiment.add(task, name=record.name)
            job = experiment.jobs[0].executor
            assert isinstance(job, run.SlurmExecutor)
            if dry_run:
                experiment.dryrun(log=False, delete_exp_dir=False)
                script = Path(job.job_dir, "sbatch.sh").read_text()
                shutil.rmtree(job.experiment_dir)
                return script
            experiment.run(detach=True)
            record.job_id = experiment.jobs[0].handle.rpartition("/")[2]
    except LaunchError:
        raise
    except Exception as error:
        raise LaunchError(f"the job was not submitted: {_reason(error)}.") from error
    record.job_dir = job.job_dir
    record.nodes, record.nproc_per_node = executor.nnodes(), settings.nproc_per_node  # type: ignore[attr-defined]
    record.cluster = settings.cluster.get("name", "")  # type: ignore[attr-defined]
    record.secrets = list(settings.cluster.get("secrets", ()))  # type: ignore[attr-defined]
    if isinstance(job.tunnel, run.SSHTunnel):
        from mixtral_recipes.executors.scheduler import ssh_address

        record.ssh = ssh_address(job.tunnel)
        record.remote_dir = os.path.join(job.tunnel.job_dir, Path(job.job_dir).name)
        Path(job.job_dir, "secrets.env").unlink(missing_ok=True)  # it is over there now
    record.save()
    return Path(job.job_dir, "sbatch.sh").read_text()


def watch(record: RunRecord) -> dict[str, Any] | None:
    """Show rank 0's lines until the job ends; Ctrl-C stops watching and leaves the job alone.

    Returns:
        RUN/result.json, or None if the user stopped watching.

    Raises:
        LaunchError: the job failed or was cancelled.
    """
    state = runs.state(record)
    asked = time.monotonic()
    shown = ""

    def ended() -> bool:
        nonlocal state, asked, shown
        if time.monotonic() - asked > 1:
            runs.fetch(record)
            state, asked = runs.state(record), time.monotonic()
        if state.detail != shown and state.state in ("pending", "unknown"):
            print(f"[slurm] job {record.job_id}: {state.state} {state.detail}".rstrip(), file=sys.stderr, flush=True)
            shown = state.detail
        return state.state in FINAL

    try:
        for line in logs.follow(record, 0, ended):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"job {record.job_id} goes on; see `mixtral-recipes runs logs -f {record.id}`", file=sys.stderr)
        return None
    if state.state == "succeeded":
        return records.result(record.run_dir) or {}
    failed = logs.failure(record)
    raise LaunchError(
        f"job {record.job_id} {state.state}: {failed[0] if failed else state.detail or 'no rank reported an error'} "
        f"(`mixtral-recipes runs logs {record.id}`)."
    )


def refuse_shared_folder(record: RunRecord) -> None:
    """Raise if an unfinished Slurm run writes to the same folder; rank 0 also locks it while it runs.

    Raises:
        LaunchError: naming the other run.
    """
    others = [
        r for r in records.all_records() if r.executor == "slurm" and r.run_dir == record.run_dir and r.id != record.id
    ]
    for run_id, state in runs.states(others).items():
        if state.state not in FINAL:
            raise LaunchError(
                f"run folder {record.run_dir} belongs to run {run_id}, which has not ended ({state.state}); "
                f"choose another --name or --dir, or `mixtral-recipes runs cancel {run_id}`."
            )


def _reason(error: Exception) -> str:
    """sbatch's own last line out of invoke's report, or the error's text."""
    stderr = getattr(getattr(error, "result", None), "stderr", "")
    from mixtral_recipes.executors.slurm_status import one_line

    return one_line(stderr or str(error))
