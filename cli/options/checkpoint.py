"""A checkpoint on the command line, and what import and export offer alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.errors import CheckpointError

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint folder or nemo://ID; or a run's name, id or folder: its newest whole checkpoint.",
        autocompletion=complete_run,
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="bf16, fp16 or fp32; default: the type it has.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The model that adapters adapt, if it is not where they say."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there, if it is of the same kind and holds nothing else."),
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload the finished folder to this Hub repository."),
]
Public = Annotated[bool, typer.Option("--public", help="If the repository is created, make it public.")]


def checkpoint_folder(text: str) -> Path:
    """The folder a CHECKPOINT names. For a run, its newest complete checkpoint, which is named on stderr.

    Raises:
        CheckpointError: there is no such checkpoint, or the run has no complete one.
        LaunchError: it is neither a folder nor a run.
    """
    from mixtral_recipes.importers import locations

    return _of_run(text, locations.checkpoint)


def model_checkpoint(text: str) -> Path:
    """The checkpoint a MODEL means: as CHECKPOINT; a model or a peft folder of another form is imported first, once.

    Raises:
        CheckpointError: there is no such model.
        LaunchError: it is neither a folder nor a run.
    """
    from mixtral_recipes.importers.resolve import resolve

    return _of_run(text, resolve)


def start_of_training(text: str) -> str:
    """The MODEL that a recipe starts from, as it was written; of a run, its newest whole checkpoint.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        LaunchError: it is neither a folder nor a run.
    """
    return str(_of_run(text, lambda _: text))


def _of_run[T](text: str, otherwise: Callable[[str], T]) -> Path | T:
    from mixtral_recipes.executors.runs.records import run_folder

    path = Path(text).expanduser()
    if "://" in text or path.is_file() or (len(path.parts) > 1 and not path.exists()):
        return otherwise(text)
    folder = run_folder(text)
    return newest_whole(folder) if (folder / "checkpoints").is_dir() else otherwise(str(folder))


def base_folder(text: str | None) -> Path | None:
    """The checkpoint that ``--base`` names; a Hugging Face model is imported first, where it was not before.

    Raises:
        CheckpointError: there is nothing usable.
    """
    if text is None:
        return None
    from mixtral_recipes.importers.resolve import resolve

    return resolve(text)


def newest_whole(run_dir: Path) -> Path:
    """The newest of a run's checkpoints whose files are all there.

    Raises:
        CheckpointError: there is none.
    """
    from mixtral_recipes.checkpoints.folder import list_checkpoints
    from mixtral_recipes.checkpoints.format.integrity import damage_of
    from mixtral_recipes.cli.output import note

    found = list_checkpoints(run_dir / "checkpoints")
    for folder in reversed(found):
        damage = damage_of(folder, hashes=False)
        if damage is None:
            note(f"Checkpoint: {folder}")
            return folder
        note(f"Passing over {folder.name}: {damage}")
    if found:
        raise CheckpointError(f"{run_dir / 'checkpoints'} holds no whole checkpoint; copy them again, or train again.")
    raise CheckpointError(f"{run_dir} has saved no checkpoint; `mixtral-recipes runs status {run_dir}` says how it is.")
