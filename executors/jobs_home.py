"""nemo_run pointed at our folder of jobs."""

from pathlib import Path

from mixtral_recipes.system.files import private_folder
from mixtral_recipes.system.home import jobs_home


def use_jobs_home() -> Path:
    """Point nemo_run at our folder; it reads NEMORUN_HOME when imported, which a recipe already did."""
    from nemo_run.config import set_nemorun_home
    from nemo_run.run.torchx_backend.schedulers import slurm

    folder = private_folder(jobs_home())
    set_nemorun_home(str(folder))
    slurm.SLURM_JOB_DIRS = str(folder / ".slurm_jobs")
    return folder
