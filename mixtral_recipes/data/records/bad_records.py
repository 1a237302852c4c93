"""What happens to a record that cannot be used: the run stops, or the record is left out, counted and kept aside."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from mixtral_recipes.errors import DataError

POLICIES = ("stop", "skip")


class BadRecord(Protocol):
    """Called with each record that cannot be used; reading continues unless this raises."""

    def __call__(self, error: DataError, record: Any = None, /) -> None:
        """Take note.

        Args:
            error: Names the place and what is wrong.
            record: What was read there: a value, or the text that is not a record.
        """


def stop(error: DataError, record: Any = None) -> NoReturn:
    """What happens by default."""
    raise error


def passed_over(error: DataError, record: Any = None) -> None:
    """A bad record where another reading reports it."""


@dataclass
class Skipped:
    """Records that were left out.

    Attributes:
        file: Where they are written, one JSON object each: ``why`` and ``record``; None only counts them.
        count: How many there are.
        first: What was wrong with the first one.
    """

    file: Path | None = None
    count: int = 0
    first: str = ""

    def __call__(self, error: DataError, record: Any = None) -> None:
        """Leave one out."""
        self.count += 1
        self.first = self.first or str(error)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"why": str(error), "record": record}, default=str) + "\n")


def check_policy(name: str) -> None:
    """Refuse another word than ``stop`` and ``skip``.

    Raises:
        DataError: it is another.
    """
    if name not in POLICIES:
        raise DataError(f"data.on_bad_record={name!r} must be 'stop' or 'skip'.")
