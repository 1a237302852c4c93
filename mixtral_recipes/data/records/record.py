"""A record and its place, and the names of splits."""

from typing import Any, NamedTuple

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
SPLIT_NAMES = {spelling: name for name, spellings in SPLITS.items() for spelling in spellings}


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
