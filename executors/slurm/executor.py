"""Run a recipe on Slurm through nemo_run's SlurmExecutor: with a virtual environment, pyxis or Apptainer."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes import errors
from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm.profile import Cluster, cluster

if TYPE_CHECKING:
    import nemo_run as run


def slurm_executor(
    nodes: int = 1,
    nproc_per_node: int = 1,
    *,
    cluster_name: str | None = None,
    code: tuple[str, ...] | None = None,
    **settings: Any,
) -> "run.SlurmExecutor":
    """A SlurmExecutor that needs only Slurm and a Python environment.

    Args:
        nodes: Nodes of the job.
        nproc_per_node: Ranks per node; torchrun starts them.
        cluster_name: A profile in clusters.toml, whose settings are the defaults for ``settings``.
        code: Folders whose working trees are sent along; None sends the checkout this package runs from (nothing for
            an installed wheel). The modules of a recipe that are not installed go along too.
        settings: Any field of :class:`mixtral_recipes.executors.slurm.profile.Cluster`.

    Raises:
        LaunchError: a setting that is not known or not allowed.
    """
    import nemo_run as run

    from mixtral_recipes.executors.packager import WorkingTreePackager
    from mixtral_recipes.executors.slurm.scheduler import JobSettings, install

    if nodes < 1 or nproc_per_node < 1:
        raise LaunchError(f"nodes={nodes} with nproc_per_node={nproc_per_node} starts nothing; use 1 or more.")
    site = cluster(cluster_name, **settings)
    install()
    return run.SlurmExecutor(
        account=site.account or "",  # nemo_run splits it; our script leaves the line out
        partition=site.partition,
        job_name_prefix="",
        nodes=nodes,
        ntasks_per_node=1,
        time=site.time,
        container_image=site.container_image if site.mode == "pyxis" else None,
        packager=WorkingTreePackager(roots=list(own_checkout() if code is None else code)),
        tunnel=_tunnel(site),
        poll_estimated_start_time=False,
        job_details=JobSettings(cluster=dataclasses.asdict(site), nproc_per_node=nproc_per_node),
    )


def own_checkout() -> tuple[str, ...]:
    """The source checkout this package is imported from, or nothing when it is an installed wheel."""
    root = Path(errors.__file__).resolve().parent.parent
    return (str(root),) if (root / "pyproject.toml").exists() else ()


def _tunnel(site: Cluster) -> Any:
    import nemo_run as run

    if not site.ssh:
        return run.LocalTunnel(job_dir="")  # nemo_run then uses the folder of its experiments
    user, _, host = site.ssh.partition("@")
    host, _, port = host.partition(":")
    return run.SSHTunnel(
        host=host, user=user, port=int(port) if port else None, identity=site.ssh_key, job_dir=str(site.job_dir)
    )
