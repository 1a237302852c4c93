"""The folder for everything that outlives a command: imports, prepared data, jobs and the records of runs."""

import os
from pathlib import Path


def home() -> Path:
    """``$MIXTRAL_RECIPES_HOME``, by default ``~/.cache/mixtral-recipes``."""
    return _folder("MIXTRAL_RECIPES_HOME", Path("~/.cache/mixtral-recipes"))


def models_home() -> Path:
    """Finished imports; ``nemo://ID`` is looked up there."""
    return home() / "models"


def data_home() -> Path:
    """Prepared data: index maps, packs and hashes."""
    return home() / "data"


def get_dataset_root(name: str) -> Path:
    """NeMo's function of this name: a folder for a data set, which is made if it is not there."""
    folder = data_home() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runs_home() -> Path:
    """The records of runs, a folder each."""
    return home() / "runs"


def jobs_home() -> Path:
    """``$NEMORUN_HOME``: experiments, packaged code, sbatch scripts and logs.

    Not called ``nemo_run``: nemo_run replaces every ``/nemo_run`` inside an sbatch script with the job folder, which
    garbles the paths of a home folder that contains that name itself.
    """
    return _folder("NEMORUN_HOME", home() / "jobs")


def elsewhere(path: Path) -> str:
    """How a user has something put into another folder: of our own, by the variable that names it."""
    if os.environ.get("NEMORUN_HOME") and path.is_relative_to(jobs_home()):
        return "set NEMORUN_HOME to a folder"
    return "set MIXTRAL_RECIPES_HOME to a folder" if path.is_relative_to(home()) else "choose a folder"


def _folder(variable: str, default: Path) -> Path:
    """A variable's folder, absolute: jobs start elsewhere, and a ``~`` in sbatch or YAML meets no shell."""
    return Path(os.environ.get(variable) or default).expanduser().absolute()


def __getattr__(name: str) -> Path:
    """NeMo's name for `home`."""
    if name == "DEFAULT_NEMO_CACHE_HOME":
        return home()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
