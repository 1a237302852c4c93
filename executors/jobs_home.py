"""nemo_run pointed at our folder of jobs."""

from pathlib import Path

from mixtral_recipes.system.files import private_folder
from mixtral_recipes.system.home import jobs_home


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
