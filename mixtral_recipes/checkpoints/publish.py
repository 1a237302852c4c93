"""Put a finished folder under its name, in place of another only where that is certainly ours."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from mixtral_recipes.checkpoints.format import manifest
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import clear_leftovers, replacing_folder

Written = Literal["model", "adapter", "export"]
_SHOWN = 3


@contextlib.contextmanager
def publish(
    final: Path, kind: Written, *, overwrite: bool = False, sources: Iterable[Path | None] = ()
) -> Iterator[Path]:
    """`files.replacing_folder`, under the rule of what may be replaced.

    That is a folder of the same kind that lists every file in it, and that nothing is read from.

    Args:
        final: The folder to make.
        kind: What it will hold: an imported ``model``, an ``adapter`` checkpoint, or an ``export``.
        overwrite: Whether one that is there may be replaced.
        sources: The folders that are read for it.

    Raises:
        CheckpointError: ``final`` may not be replaced; the message says what stands there.
    """
    read = [source.resolve() for source in sources if source is not None]
    _refuse(final, kind, overwrite, read)
    clear_leftovers(final)
    with replacing_folder(final) as staging:
        yield staging
        _refuse(final, kind, overwrite, read)


def _refuse(final: Path, kind: Written, overwrite: bool, sources: list[Path]) -> None:
    if final.is_symlink():
        raise CheckpointError(
            f"{final} is a link to {os.readlink(final)}; name another folder, or the one it leads to, by its own path."
        )
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    for source in sources:
        if source.is_relative_to(final.resolve()):
            what = "is what is read" if source == final.resolve() else f"holds {source}, which is read"
            raise CheckpointError(f"{final} {what}; choose another folder for the result.")
    if not overwrite:
        raise CheckpointError(f"{final} exists; choose another folder, remove it, or pass --overwrite.")
    listed = _listed(final, kind)
    here = (path for path in final.rglob("*") if path.is_symlink() or not path.is_dir())
    stray = sorted(name for path in here if (name := path.relative_to(final).as_posix()) not in listed)
    if stray:
        raise CheckpointError(
            f"{final} also has {_some(stray)}, which mixtral-recipes did not write; "
            "--overwrite would remove it: move it away, or choose another folder."
        )


def _listed(final: Path, kind: Written) -> set[str]:
    """The files that a folder of ours says it has."""
    if final.is_dir() and (final / manifest.NAME).is_file():
        found = manifest.read_manifest(final)
        if found["kind"] == kind:
            return {manifest.NAME, *found["files"]}
        what = {"model": "an imported model", "training": "a run's checkpoint", "adapter": "an adapter checkpoint"}
        raise CheckpointError(
            f"{final} is {what.get(found['kind'], 'a checkpoint of another kind')}, not {what.get(kind, 'an export')}; "
            "--overwrite replaces only the same kind: choose another folder, or remove it."
        )
    if final.is_dir() and kind == "export":
        record = lineage.read_or_none(final)
        if record is not None and record.kind == "export" and record.files:
            return set(record.files)
    has = f"; it has {_some(sorted(path.name for path in final.iterdir()))}" if final.is_dir() else ""
    raise CheckpointError(
        f"{final} is not a checkpoint folder of mixtral-recipes, nor an export that lists its files{has}: "
        "--overwrite replaces nothing else. Choose another folder, or remove it."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
