"""Run a recipe on Slurm through nemo_run's SlurmExecutor: with a virtual environment, pyxis or Apptainer."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes import errors
from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.names import check_path
from mixtral_recipes.executors.slurm.profile import cluster

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
    from mixtral_recipes.executors.packager import WorkingTreePackager
    from mixtral_recipes.executors.slurm.job_settings import made_for
    from mixtral_recipes.executors.slurm.scheduler import install

    if nodes < 1 or nproc_per_node < 1:
        raise LaunchError(f"nodes={nodes} with nproc_per_node={nproc_per_node} starts nothing; use 1 or more.")
    install()
    made = made_for(cluster(cluster_name, **settings), nodes, nproc_per_node)
    made.packager = WorkingTreePackager(roots=list(own_checkout() if code is None else code))
    return made


def for_recipe(executor: "run.SlurmExecutor", recipe: Any, folder: Path) -> None:
    """Have a `slurm_executor` ask for GPUs where the recipe has ranks on them and the profile says nothing else.

    Args:
        executor: The executor, which is changed.
        recipe: What it will start.
        folder: The recipe's output folder, which containers must see.

    Raises:
        LaunchError: no container can be given the folder.
    """
    settings: Any = executor.job_details
    settings.folders = [check_path(folder, "output folder")]
    if getattr(getattr(recipe, "trainer", None), "accelerator", "") == "gpu":
        settings.cluster = dataclasses.asdict(settings.profile().for_gpus(settings.nproc_per_node))


def own_checkout() -> tuple[str, ...]:
    """The source checkout this package is imported from, or nothing when it is an installed wheel."""
    root = Path(errors.__file__).resolve().parent.parent
    return (str(root),) if (root / "pyproject.toml").exists() else ()
