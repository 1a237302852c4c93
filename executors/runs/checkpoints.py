"""The checkpoint that a name stands for: a place, or a run, whose newest whole checkpoint it is.

Commands and `mixtral_recipes.api` both ask here, so that they take the same names. Loads nothing heavy.
"""

import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system import locks
from mixtral_recipes.system.escapes import printable
from mixtral_recipes.system.ranks import first, joined, launched_rank


def checkpoint_folder(text: str | Path) -> Path:
    """The folder a CHECKPOINT names. For a run, its newest complete checkpoint, which is named on stderr.

    Raises:
        CheckpointError: there is no such checkpoint, or the run has no complete one.
        LaunchError: it is neither a folder nor a run.
    """
    from mixtral_recipes.importers import locations

    return _of_run(str(text), locations.checkpoint)


def model_checkpoint(text: str | Path) -> Path:
    """The checkpoint a MODEL means: as CHECKPOINT; a model or a peft folder of another form is imported first, once.

    All ranks call it together: a run may save while they look.

    Raises:
        CheckpointError: there is no such model.
        LaunchError: it is neither a folder nor a run.
    """
    from mixtral_recipes.importers.resolve import resolve

    return _of_run(str(text), resolve, together=True)


def base_folder(text: str | Path | None) -> Path | None:
    """The checkpoint that ``--base`` names, as MODEL; None stays None."""
    from mixtral_recipes.importers.resolve import resolve

    return None if text is None else _of_run(str(text), resolve)


def with_start(resume: Any) -> Any:
    """A copy of a recipe's ``resume`` that names places where it named runs: of a run, its newest whole checkpoint.

    All ranks call it together.

    Args:
        resume: An AutoResume, or a config of one; or None.

    Raises:
        CheckpointError: a run has no complete checkpoint.
        LaunchError: one that is named is neither a folder nor a run.
    """
    made = copy.deepcopy(resume)
    restore = getattr(made, "restore_config", None)
    for holder, name in ((restore, "path"), (restore, "adapter_path"), (made, "resume_from_path")):
        named = str(getattr(holder, name, None) or "")
        place = named and str(_of_run(named, lambda text: text, together=True))
        if place != named:
            setattr(holder, name, place)
    return made


def _of_run[T](text: str, otherwise: Callable[[str], T], *, together: bool = False) -> Path | T:
    from mixtral_recipes.executors.runs.records import run_folder

    path = Path(text).expanduser()
    if "://" in text or path.is_file() or (len(path.parts) > 1 and not path.exists()):
        return otherwise(text)
    folder = run_folder(text)
    if not (folder / "checkpoints").is_dir():
        return otherwise(str(folder))
    with joined() if together else contextlib.nullcontext() as group:
        return first(lambda: _newest_whole(folder), group) if together else _newest_whole(folder)


def _newest_whole(run_dir: Path) -> Path:
    """The newest checkpoint whose files are all there; the run keeps it until this process ends."""
    from mixtral_recipes.checkpoints.folder import list_checkpoints
    from mixtral_recipes.checkpoints.format.integrity import damage_of
    from mixtral_recipes.checkpoints.format.manifest import NAME

    found = list_checkpoints(run_dir / "checkpoints")
    for folder in reversed(found):
        locks.use(folder / NAME)
        damage = damage_of(folder, hashes=False)
        if damage is None:
            _note(f"Checkpoint: {folder}")
            return folder
        if not folder.exists():
            return _newest_whole(run_dir)  # the run has removed it, so there is a newer one
        _note(f"Skipping {folder.name}: {damage}")
    if found:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'} holds no intact checkpoint; copy the checkpoints again, or train again."
        )
    raise CheckpointError(f"{run_dir} has not saved a checkpoint; see `mixtral-recipes runs status {run_dir}`.")


def _note(text: str) -> None:
    if launched_rank() == 0:
        print(printable(text), file=sys.stderr, flush=True)
