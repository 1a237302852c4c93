"""What a `slurm_executor` holds for its job: the profile, and what is set on the executor afterwards."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from nemo_run.core.execution.launcher import Launcher
from nemo_run.core.execution.slurm import SlurmExecutor, SlurmJobDetails
from nemo_run.core.tunnel.client import LocalTunnel

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm.profile import Cluster
from mixtral_recipes.executors.slurm.tunnel import SSHTunnel

#: Fields of the executor that nemo_run fills in, or that our script takes from it as they are.
_NEMO_RUNS = {
    "packager", "experiment_id", "job_dir", "experiment_dir", "_launcher_setup", "nodes", "job_details", "tunnel",
    "dependencies", "job_name", "env_vars",
}  # fmt: skip
_TERM = re.compile(r"(?:15|(?:SIG)?TERM)@(\d+)")


@dataclasses.dataclass(kw_only=True)
class JobSettings(SlurmJobDetails):
    """The cluster profile of one job; nemo_run clones, stores and reloads it with the executor."""

    cluster: dict[str, Any] = dataclasses.field(default_factory=dict)
    nproc_per_node: int = 1
    torchrun: bool = True
    recipe_file: str = ""  # copied into the job folder; empty when nemo_run stores the task itself
    folders: list[str] = dataclasses.field(default_factory=list)
    rehearsal: bool = False  # only the script is wanted: secrets are checked, and not written

    @property
    def ls_term(self) -> str:
        """Where this job's logs are, for nemo_run."""
        return os.path.join(self.folder or "", "attempts", "*", "node-*.log")

    def profile(self) -> Cluster:
        """The profile, checked again."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.cluster.items()}
        return Cluster(**settings)


def made_for(site: Cluster, nodes: int, nproc_per_node: int) -> SlurmExecutor:
    """A new executor with a profile's settings; it packs nothing yet."""
    return SlurmExecutor(
        account=site.account or "",  # nemo_run splits it; our script leaves the line out
        partition=site.partition,
        job_name_prefix="",
        nodes=nodes,
        ntasks_per_node=1,
        time=site.time,
        container_image=site.container_image if site.mode == "pyxis" else None,
        tunnel=_tunnel(site),
        poll_estimated_start_time=False,
        job_details=JobSettings(cluster=dataclasses.asdict(site), nproc_per_node=nproc_per_node),
    )


def _tunnel(site: Cluster) -> Any:
    if not site.ssh:
        return LocalTunnel(job_dir="")  # nemo_run then uses the folder of its experiments
    user, _, host = site.ssh.rpartition("@")
    host, _, port = host.partition(":")
    return SSHTunnel(
        host=host, user=user, port=int(port) if port else None, identity=site.ssh_key, job_dir=str(site.job_dir)
    )


def settled(executor: SlurmExecutor, env: Mapping[str, str]) -> Cluster:
    """The profile of a `slurm_executor`'s job, with what a script or a plugin set on the executor itself.

    Args:
        executor: The executor.
        env: The job's variables, those of the executor included.

    Raises:
        LaunchError: something that the job's script does not take from there, or that is not allowed.
    """
    settings: Any = executor.job_details
    site = settings.profile()
    fresh = made_for(site, executor.nodes, settings.nproc_per_node)
    given: dict[str, Any] = {"env": {**site.env, **env}}
    ours = {field.name for field in dataclasses.fields(Cluster)}
    for name, value in vars(executor).items():
        if name in _NEMO_RUNS or value == getattr(fresh, name, value):
            continue
        if name == "launcher" and type(value) is Launcher:  # any other would start ranks of its own
            continue
        if name == "signal" and (term := _TERM.fullmatch(value)):
            given["grace_s"] = int(term[1])
        elif name in ours:
            given[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise LaunchError(
                f"the executor's {name}={value!r} has no effect in the script that slurm_executor writes; pass "
                "slurm_executor(...) a setting of a cluster profile (docs/guide/clusters.md), or use run.SlurmExecutor."
            )
    return dataclasses.replace(site, **given)
