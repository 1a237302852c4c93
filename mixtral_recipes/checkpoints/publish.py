"""Put a finished folder, or file, under its name, in place of another only where that is certainly ours."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.format import manifest
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError, some_of
from mixtral_recipes.system.files import clear_leftovers, replacing_files, replacing_folder
from mixtral_recipes.system.locks import held

Written = Literal["model", "adapter", "export"]
_SHOWN = 3


@contextlib.contextmanager
def publish(
    final: Path, kind: Written, *, overwrite: bool = False, sources: Iterable[Path | None] = ()
) -> Iterator[Path]:
    """`files.replacing_folder`, one process at a time, under the rule of what may be replaced.

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
    with held(final):
        _refuse(final, kind, overwrite, read)
        clear_leftovers(final)
        with replacing_folder(final) as staging:
            yield staging
            _refuse(final, kind, overwrite, read)


@contextlib.contextmanager
def publish_file(
    final: Path, beside: Sequence[str], *, overwrite: bool = False, sources: Iterable[Path | None] = ()
) -> Iterator[Path]:
    """`files.replacing_files`, likewise, under the rule of what may be replaced: files that an export of ours lists.

    Args:
        final: The file to make; its lineage stands beside it.
        beside: Names of the files that come with it, its lineage first.
        overwrite: Whether one that is there may be replaced.
        sources: The folders that are read for it.

    Raises:
        CheckpointError: ``final``, or a file beside it, may not be replaced; the message says what stands there.
    """
    read = [source.resolve() for source in sources if source is not None]
    with held(final):
        _refuse_file(final, beside, overwrite, read)
        with replacing_files(final, beside) as staging:
            yield staging
            _refuse_file(final, beside, overwrite, read)


def _refuse_inside(final: Path, sources: list[Path]) -> None:
    """A checkpoint with a file too many is a damaged one."""
    for source in sources:
        if final.parent.resolve().is_relative_to(source) and (source / manifest.NAME).is_file():
            raise CheckpointError(
                f"{final} would be inside {source}, which is the input; choose another place for the result."
            )


def _refuse_file(final: Path, beside: Sequence[str], overwrite: bool, sources: list[Path]) -> None:
    _refuse_inside(final, sources)
    there = [path for name in (final.name, *beside) if os.path.lexists(path := final.with_name(name))]
    for path in there:
        if path.is_symlink() or not path.is_file():
            what = f"a link to {os.readlink(path)}" if path.is_symlink() else "a folder"
            raise CheckpointError(f"{path} is {what}; choose another name for the result.")
    if final in there and not overwrite:
        raise CheckpointError(f"{final} exists; choose another name, remove it, or pass --overwrite.")
    record = lineage.read_file(final.with_name(beside[0])) if there else None
    listed = set(record.files) if record is not None and record.kind == "export" else set()
    stray = [path.name for path in there if path.name not in listed]
    if stray:
        raise CheckpointError(
            f"{some_of(stray, _SHOWN)} in {final.parent} {'are' if len(stray) > 1 else 'is'} not part of an export of "
            f"{final.name}, and --overwrite replaces nothing else; choose another name, or move it away."
        )


def _refuse(final: Path, kind: Written, overwrite: bool, sources: list[Path]) -> None:
    if final.is_symlink():
        raise CheckpointError(
            f"{final} is a link to {os.readlink(final)}; choose another folder, or pass the path that the link points "
            "to."
        )
    _refuse_inside(final, sources)
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    for source in sources:
        if source.is_relative_to(final.resolve()):
            what = "is the input" if source == final.resolve() else f"contains {source}, which is the input"
            raise CheckpointError(f"{final} {what}; choose another folder for the result.")
    if not overwrite:
        raise CheckpointError(f"{final} exists; choose another folder, remove it, or pass --overwrite.")
    listed = _listed(final, kind)
    here = (path for path in final.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    stray = sorted(name for path in here if (name := path.relative_to(final).as_posix()) not in listed)
    if stray:
        raise CheckpointError(
            f"{final} also has {some_of(stray, _SHOWN)}, which mixtral-recipes did not write and --overwrite would "
            "remove; move it away, or choose another folder."
        )


def _listed(final: Path, kind: Written) -> set[str]:
    """The files that a folder of ours says it has."""
    if final.is_dir() and (final / manifest.NAME).is_file():
        found = manifest.read_manifest(final)
        if found["kind"] == kind:
            return {manifest.NAME, scores.NAME, *found["files"]}
        what = {"model": "an imported model", "training": "a run's checkpoint", "adapter": "an adapter checkpoint"}
        raise CheckpointError(
            f"{final} is {what.get(found['kind'], 'a checkpoint of another kind')}, not {what.get(kind, 'an export')}, "
            "and --overwrite replaces only the same kind; choose another folder, or remove it."
        )
    if final.is_dir() and kind == "export":
        record = lineage.read_or_none(final)
        if record is not None and record.kind == "export" and record.files:
            return {scores.NAME, *record.files}
    has = f"; it has {some_of(sorted(path.name for path in final.iterdir()), _SHOWN)}" if final.is_dir() else ""
    raise CheckpointError(
        f"{final} is neither a mixtral-recipes checkpoint nor an export that lists its files{has}, and --overwrite "
        "replaces nothing else; choose another folder, or remove it."
    )
