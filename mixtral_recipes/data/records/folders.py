"""The data files of a folder, and which split each is of: the one way a folder is looked through."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.record import SPLITS, is_of_split
from mixtral_recipes.errors import DataError

# What `datasets` writes beside the records.
_ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SHARD = re.compile(r"(.*?)-?\d+-of-\d+(\..*)")
# Hugging Face's H4 publishes splits for one task each in one folder: train_sft beside train_gen and train_prefs.
_FINE_TUNING = re.compile(r"(train|test)_sft[-_.].*", re.IGNORECASE)
_ABOUT_THE_FOLDER = ("readme", "license", "licence")


def files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Its files with one of these endings, at any depth; nothing hidden, and of a Hub's cache the current revision.

    Raises:
        DataError: it is a Hub's cache with several revisions, none of which is the current one; a folder in it cannot
            be read, or is there twice; a file in it is a link to nothing.
    """
    root = _revision(folder) if (folder / "snapshots").is_dir() else folder
    found = [path for path in sorted(_below(root)) if suffix_of(path) in suffixes and path.name not in _ABOUT]
    broken = next((path for path in found if path.is_symlink() and not path.exists()), None)
    if broken is not None:
        raise DataError(f"{broken}: a link to {os.readlink(broken)}, which does not exist; fix or remove it.")
    return [path for path in found if path.is_file()]


def _below(root: Path) -> Iterator[Path]:
    """What is in it and in its folders, linked ones too, but for links to a folder they are themselves in."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error

    read: dict[Path, Path] = {}
    for name, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(name)
        other = read.setdefault(here.resolve(), here)
        if other != here:
            raise DataError(
                f"{here} and {other} are the same folder, so its files would be read twice; remove the link, or pass "
                "only the folders to read."
            )
        around = {part.resolve() for part in (here, *here.parents) if part.is_relative_to(root)}
        folders[:] = [each for each in folders if each[0] != "." and (here / each).resolve() not in around]
        yield from (here / each for each in files if each[0] != ".")


def by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, told by the name of the file or of the folder it is in; of none under an empty name.

    A name begins with its split's; where none begins with the training split's, it may stand behind another word
    (``c4-train.00000-of-01024.json.gz``).
    """
    found = _grouped(folder, files, behind=False)
    if "train" not in found:
        wider = _grouped(folder, files, behind=True)
        found = wider if "train" in wider else found
    for name, some in list(found.items()):
        wanted = [file for file in some if _FINE_TUNING.fullmatch(file.name)] if name else []
        if wanted:
            found[""] = found.get("", []) + [file for file in some if file not in wanted]
            found[name] = wanted
    return {name: found[name] for name in (*SPLITS, "") if found.get(name)}


def _grouped(folder: Path, files: Sequence[Path], *, behind: bool) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        split = next((name for name in SPLITS if is_of_split(file.relative_to(folder), name, behind=behind)), "")
        found.setdefault(split, []).append(file)
    return found


def are_one_set(files: Sequence[Path]) -> bool:
    """Whether they are a single file, or the shards of one set (``data-00000-of-00002.arrow``)."""
    names = {match.groups() if (match := _SHARD.fullmatch(file.name)) else file.name for file in files}
    return len(files) == 1 or (len(names) == 1 and len({file.parent for file in files}) == 1)


def is_about_the_folder(file: Path) -> bool:
    """Whether it is the folder's README or licence, whatever its ending."""
    return file.stem.lower() in _ABOUT_THE_FOLDER


def names_of_data(files: Sequence[Path]) -> tuple[str, ...]:
    """The names of files, but of those that are about the folder."""
    return tuple(file.name for file in files if not file.name.lower().startswith(_ABOUT_THE_FOLDER))


def _revision(folder: Path) -> Path:
    main = folder / "refs" / "main"
    there = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    current = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
    if current in there:
        return current
    if len(there) != 1:
        raise DataError(f"{folder}: has {len(there)} revisions; pass one of them, {folder}/snapshots/REVISION.")
    return there[0]
