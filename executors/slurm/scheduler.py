"""nemo_run's Slurm scheduler with our sbatch script and without its need for sacct.

nemo_run looks a scheduler up by name; :func:`install` puts this subclass under the name of its own. Executors that
``slurm_executor`` did not make pass through to nemo_run unchanged.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_run.core.execution.slurm import SlurmExecutor
from nemo_run.core.tunnel.client import SSHTunnel
from nemo_run.core.tunnel.rsync import rsync
from nemo_run.run import experiment
from nemo_run.run.torchx_backend.schedulers import slurm as nemo_slurm
from torchx.schedulers.api import DescribeAppResponse
from torchx.specs import AppState, Role

from mixtral_recipes.executors.names import check_path
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.executors.slurm import tunnel as tunnels
from mixtral_recipes.executors.slurm.job_settings import JobSettings, settled
from mixtral_recipes.executors.slurm.sbatch import Job, render, secrets_file
from mixtral_recipes.executors.stored import RANK_MODULE
from mixtral_recipes.system.files import write_text

_nemo_runs_job_dirs = nemo_slurm._get_job_dirs
_RUNNER = "nemo_run.core.runners.fdl_runner"
_APP_STATES = {
    "pending": AppState.PENDING, "running": AppState.RUNNING, "succeeded": AppState.SUCCEEDED,
    "failed": AppState.FAILED, "cancelled": AppState.CANCELLED, "preempted": AppState.FAILED,
}  # fmt: skip


class RecipeScheduler(nemo_slurm.SlurmTunnelScheduler):
    """Writes our script in place of nemo_run's, and reads job states from squeue first."""

    def _submit_dryrun(self, app: Any, cfg: Any) -> Any:
        settings = cfg.job_details
        if isinstance(settings, JobSettings):
            check_path(cfg.experiment_dir, "job folder")
        with own_stdin():
            info = super()._submit_dryrun(app, cfg)
        if isinstance(settings, JobSettings):
            script = write_job(app.roles[0], cfg, settings)
            info._fmt = lambda _request: script
        return info

    def schedule(self, dryrun_info: Any) -> str:
        """Submit the script; return the job id."""
        with own_stdin():
            return super().schedule(dryrun_info)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """State of a job from squeue, sacct, or the job's own history; UNKNOWN while the controller is away."""
        folder, tunnel, _ = job_dirs().get(app_id, ("", None, ""))
        if not _is_ours(folder):
            return super().describe(app_id)
        ssh = tunnels.address(tunnel) if isinstance(tunnel, SSHTunnel) else ""
        state = slurm_status.query([app_id], ssh=ssh)[app_id]
        if ssh and state == slurm_status.FORGOTTEN:
            login.fetch(ssh, os.path.join(tunnel.job_dir, Path(folder).name), folder)
        if state.state == "unknown":
            state = slurm_status.from_history(folder, app_id) or state
        name = Path(folder).name
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=name, num_replicas=1, image="")],
            state=_APP_STATES.get(state.state, AppState.UNKNOWN),
            msg=state.detail,
        )


@contextlib.contextmanager
def own_stdin() -> Iterator[None]:
    """Keep stdin from nemo_run's commands: invoke would consume input that a shell loop still needs."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def write_job(role: Any, executor: SlurmExecutor, settings: JobSettings) -> str:
    """Write the script, the recipe and the secrets of one job into its folder; return the script."""
    local = Path(executor.job_dir)
    remote = os.path.join(executor.tunnel.job_dir, local.name)
    local.chmod(0o700)
    Path(executor.experiment_dir).chmod(0o700)
    (local / "code").mkdir(exist_ok=True)
    if settings.recipe_file:
        target = local / "configs" / "recipe.json"
        target.parent.mkdir(exist_ok=True)
        write_text(target, Path(settings.recipe_file).read_text(), private=True)
    cluster = settled(executor, role.env)
    umask = os.umask(0o077)
    os.umask(umask)
    job = Job(
        name=executor.job_name,
        job_dir=remote,
        nodes=executor.nnodes(),
        nproc_per_node=settings.nproc_per_node,
        arguments=_arguments(role, remote),
        umask=umask,
        torchrun=settings.torchrun,
        folders=tuple(settings.folders),
    )
    script = render(job, cluster)
    write_text(Path(executor.experiment_dir) / f"{executor.job_name}_sbatch.sh", script, private=True)
    write_text(local / "sbatch.sh", script, private=True)
    secrets = secrets_file(cluster.secrets, cluster.env_file)
    if secrets and not settings.rehearsal:
        write_text(local / "secrets.env", secrets, private=True)
    return script


def _arguments(role: Any, job_dir: str) -> tuple[str, ...]:
    """What torchrun starts. nemo_run's own runner is replaced by ours, which records how each rank ended."""
    arguments = [a.replace("/nemo_run", job_dir, 1) if a.startswith("/nemo_run/") else a for a in role.args]
    if role.entrypoint == "nsys":
        arguments.pop()  # nemo_run ends them with an empty one
    if _RUNNER in arguments:
        arguments[arguments.index(_RUNNER) :] = [RANK_MODULE, arguments[-1]]
    return tuple(arguments) if role.entrypoint == "python" else ("--no-python", role.entrypoint, *arguments)


def create_scheduler(session_name: str, **settings: Any) -> RecipeScheduler:
    """What nemo_run calls to get its Slurm scheduler."""
    return RecipeScheduler(session_name, experiment=settings.pop("experiment", None))


def install() -> None:
    """Make nemo_run use what is ours in this process; a test watches that it still looks it up this way."""
    nemo_slurm.create_scheduler = create_scheduler
    nemo_slurm._get_job_dirs = job_dirs
    experiment.rsync = sent


def job_dirs(retries: int = 5) -> dict[str, tuple[str, Any, str]]:
    """What nemo_run has stored of submitted jobs: folder, tunnel, logs. The tunnel of one of ours is one of ours."""
    found = _nemo_runs_job_dirs(retries)
    for app_id, (folder, tunnel, logs) in found.items():
        if isinstance(tunnel, SSHTunnel) and _is_ours(folder):
            found[app_id] = folder, tunnels.as_ours(tunnel), logs
    return found


def _is_ours(folder: str) -> bool:
    """Whether a job folder was written by `write_job`."""
    return Path(folder, "configs").is_dir() and Path(folder, "sbatch.sh").exists()


def sent(session: Any, source: str, target: str, **settings: Any) -> None:
    """What nemo_run calls to bring an experiment's folder to a login node. Its own way leaves links behind."""
    if isinstance(session, tunnels.SSHTunnel):
        session.send(source, target)
    else:
        rsync(session, source, target, **settings)
