"""A record and its place, and the names of splits."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_IN_NAMES = {
    name: re.compile(rf"(?:{'|'.join(spellings)})(?:$|[-_.].*)", re.IGNORECASE) for name, spellings in SPLITS.items()
}
SPLIT_NAMES = {spelling: name for name, spellings in SPLITS.items() for spelling in spellings}
_HOLDERS = ("data", "records", "rows", "examples", "samples", "instances", "items")


def to_judge_on(splits: Sequence[str]) -> str:
    """The split to judge a model on that was trained on none: validation, or where it is not there test, or train."""
    return next(name for name in ("validation", "test", "train") if name in splits)


def is_of_split(path: Path, split: str, *, behind: bool = False) -> bool:
    """Whether a file is named after a split (``train-00000-of-00002.parquet``), or a folder it is in.

    Args:
        path: The file, below the data set's folder.
        split: A name in `SPLITS`.
        behind: Whether its name may also stand behind another word.
    """
    in_folder = any(part.lower() in SPLITS[split] for part in path.parts[:-1])
    starts = [0, *(match.end() for match in re.finditer(r"[-_.]", path.name) if behind)]
    return in_folder or any(_IN_NAMES[split].fullmatch(path.name, start) for start in starts)


def may_hold(name: str) -> bool:
    """Whether a list of that name in an object would hold the records."""
    return name.lower() in _HOLDERS or name.lower() in SPLIT_NAMES


def is_filled(value: Any) -> bool:
    """Whether a field says anything: null, and what is empty or blank, is how tables write that it is not there."""
    return value is not None and value not in ("", [], {}) and not (isinstance(value, str) and value.isspace())


class Record(NamedTuple):
    """A record and its place.

    Attributes:
        value: What was read.
        where: ``file:line``, ``file: row n`` or ``hub-id:split[n]``.
        text: Its own JSON text, where a JSON file was read.
    """

    value: Any
    where: str
    text: str | None = None
