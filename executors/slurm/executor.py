"""Run a recipe on Slurm through nemo_run's SlurmExecutor: with a virtual environment, pyxis or Apptainer."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes import errors
from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning
from mixtral_recipes.executors.names import check_path, quote
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm.profile import Cluster, cluster
from mixtral_recipes.executors.slurm.status import one_line
from mixtral_recipes.system.home import home

if TYPE_CHECKING:
    import nemo_run as run

#: Settings of a recipe that name files it reads, if they do not name a repository of the Hub or hold a template.
_FILE_SETTING = re.compile(
    r"\.(dataset_root|paths(\[.*\])?|path|adapter_path|resume_from_path"
    r"|tokenizer|pretrained_model_name|vocab_file|merges_file|chat_template)$"
)

_HOME = "MIXTRAL_RECIPES_HOME"
#: Variables that say where weights and data are. sbatch passes no others on, and a job would look elsewhere.
_PLACES = (_HOME, "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


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
        LaunchError: a setting that is unknown or not allowed.
    """
    from mixtral_recipes.executors.packager import WorkingTreePackager
    from mixtral_recipes.executors.slurm.job_settings import made_for
    from mixtral_recipes.executors.slurm.scheduler import install

    if nodes < 1 or nproc_per_node < 1:
        raise LaunchError(f"nodes={nodes} with nproc_per_node={nproc_per_node} would start nothing; use 1 or more.")
    install()
    site = cluster(cluster_name, **settings)
    places = _places(site)
    made = made_for(dataclasses.replace(site, env=places | site.env), nodes, nproc_per_node)
    if site.mode != "venv" and _HOME not in site.env and _HOME in places:
        made.job_details.folders = [check_path(places[_HOME], _HOME)]  # pyright: ignore[reportAttributeAccessIssue]
    made.packager = WorkingTreePackager(roots=list(own_checkout() if code is None else code))
    return made


def _places(site: Cluster) -> dict[str, str]:
    """Where a job looks for what this shell has imported, prepared or downloaded, unless the profile's ``env`` says."""
    if site.mode == "venv" and not site.ssh:
        return {name: os.path.abspath(os.path.expanduser(os.environ[name])) for name in _PLACES if os.environ.get(name)}
    if site.mode == "pyxis" and site.ssh:  # the home folder over there may not be in the container, or not for writing
        return {_HOME: f"{site.job_dir}/home"}
    return {_HOME: str(home())} if site.mode != "venv" and not site.ssh else {}


def for_recipe(executor: "run.SlurmExecutor", recipe: Any, folder: Path, command: Sequence[str] = ()) -> None:
    """Have a `slurm_executor` ask for GPUs where the recipe has ranks on them and the profile says nothing else.

    A warning names each file of the recipe or the command that the job's container does not mount.

    Args:
        executor: The executor, which is changed.
        recipe: What it will start.
        folder: The recipe's output folder, which containers must see.
        command: What it will start instead: a command's arguments; ``recipe`` is None then.

    Raises:
        LaunchError: a container cannot mount the folder.
    """
    settings: Any = executor.job_details
    settings.folders = list(dict.fromkeys([check_path(folder, "output folder"), *settings.folders]))
    site: Cluster = settings.profile()
    if site.container_image:
        files = (
            {f"{name}={file}": file for name, file in _files_of(with_full_paths(recipe, site)).items()}
            if recipe
            else {}
        )
        files |= {text: text for text in command if text.startswith("/")}
        _warn_of_what_no_container_sees(files, site, settings.folders)
    if getattr(getattr(recipe, "trainer", None), "accelerator", "") == "gpu":
        settings.cluster = dataclasses.asdict(site.for_gpus(settings.nproc_per_node))


def _warn_of_what_no_container_sees(files: Mapping[str, str], site: Cluster, folders: list[str]) -> None:
    mounts = [text.split(":") for mount in site.mounts for text in mount.split(",")]
    seen = [*folders, *(parts[1] if len(parts) > 1 else parts[0] for parts in mounts)]
    if site.mode == "apptainer":
        seen += [str(Path.home()), "/tmp"]  # what it mounts by itself
    for said, file in files.items():
        if not any(Path(file).is_relative_to(place) for place in seen):
            mount = Path(file).parent
            warnings.warn(
                f"{said} is not inside any folder that the job's container mounts; unless the image has it, "
                f"add mounts = ['{mount}:{mount}'] to the profile (--slurm mounts={mount}:{mount}).",
                MixtralRecipesWarning,
                stacklevel=4,
            )


def _files_of(recipe: Any) -> dict[str, str]:
    """The full paths that a recipe reads, by setting."""
    from fiddle import daglish

    named = {
        daglish.path_str(path).removeprefix("."): value.removeprefix("nemo://").removeprefix("hf://")
        for value, path in daglish.iterate(recipe)
        if isinstance(value, str) and _FILE_SETTING.search(daglish.path_str(path))
    }
    return {setting: text for setting, text in named.items() if text.startswith("/")}


def with_full_paths(recipe: Any, site: Cluster) -> Any:
    """A copy of a recipe whose files are named by full paths: its job has another working folder.

    Args:
        recipe: A recipe in fiddle's form.
        site: The cluster it goes to, which says where a relative path begins.
    """
    from fiddle import daglish

    runs = site.folder(recipe.log.log_dir or "runs")

    def placed(value: Any, state: Any) -> Any:
        if isinstance(value, str) and (setting := _FILE_SETTING.search(daglish.path_str(state.current_path))):
            scheme = next((each for each in ("hf://", "nemo://") if value.startswith(each)), "")
            text = value.removeprefix(scheme)
            place = site.folder(text)
            is_path = _is_path(text, template=setting[1] == "chat_template") or (not scheme and runs in place.parents)
            return f"{scheme}{place}" if is_path else value
        return state.map_children(value) if state.is_traversable(value) else value

    return daglish.MemoizedTraversal.run(placed, recipe)


def _is_path(text: str, *, template: bool) -> bool:
    """Whether a text is a relative path of a file, which need not be here: ``org/name`` may be on the Hub."""
    if os.path.exists(text) or os.path.exists(f"{text}.bin"):  # of a corpus, which is named without .bin
        return True
    name = text.partition("@")[0]  # a revision may have slashes
    return not template and "://" not in text and name[:1] != "~" and (name.startswith(".") or name.count("/") > 1)


def check_files_there(executor: "run.SlurmExecutor", recipe: Any) -> None:
    """Refuse a recipe that starts from files, or reads some, that are not on the cluster behind ssh it goes to.

    Args:
        executor: A `slurm_executor`; without ssh nothing is checked.
        recipe: What it will start.

    Raises:
        LaunchError: names the setting and the file; or the login node cannot be reached.
    """
    settings: Any = executor.job_details
    site = settings.profile()
    if not site.ssh:
        return
    named = _files_of(recipe)
    if not named:
        return
    looked_at = " ".join(map(quote, named.values()))
    # a corpus is named without .bin
    done = login.run(site.login, f'for file in {looked_at}; do compgen -G "$file*" > /dev/null || echo "$file"; done')
    if done.returncode:
        raise LaunchError(f"{one_line(done.stderr.decode(errors='replace'))}.")
    missing = done.stdout.decode().splitlines()
    for setting, value in named.items():
        if value in missing:
            raise LaunchError(
                f"{setting}={value} does not exist on {site.ssh}, where the job runs; copy it there, and set "
                f"{setting} to its path there."
            )


def own_checkout() -> tuple[str, ...]:
    """The source checkout this package is imported from, or nothing when it is an installed wheel."""
    root = Path(errors.__file__).resolve().parent.parent
    return (str(root),) if (root / "pyproject.toml").exists() else ()
