"""The keys of an AutoModel file: known, allowed, and read as the types they must have."""

import math
import re
from collections.abc import Iterator
from typing import Any

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.overrides.automodel.keys import KEYS, row_of
from mixtral_recipes.settings.nemo.rules import Ignored, Only


class Values:
    """What a file gives, by dotted key.

    Attributes:
        given: Every value.
        taken: The keys that were looked at.
        notes: One line for each reason why keys are not needed.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        """Look every key up.

        Raises:
            RecipeError: names every unknown key, and every value that is refused.
        """
        self.given = {key: _plain(value) for key, value in _leaves(data)}
        self.taken: set[str] = set()
        self.notes: list[str] = []
        refused: list[str] = []
        unneeded: dict[str, list[str]] = {}
        for key, value in self.given.items():
            row = row_of(key)
            rule = KEYS[row] if row else None
            if row is None or rule is None:
                refused.append(f"{key} is not a known key.{nearest(key, list(KEYS))}")
            elif isinstance(rule, Ignored):
                unneeded.setdefault(rule.why, []).append(row)
            elif isinstance(rule, Only) and short_name(value) not in (rule.value, *rule.also):
                refused.append(f"{key}={value!r} is not supported: {rule.why}.")
        if refused:
            raise RecipeError(" ".join(refused))
        self.notes += [f"Not needed: {', '.join(dict.fromkeys(rows))}: {why}." for why, rows in unneeded.items()]

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value; None in the file is the default."""
        self.taken.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """A key's value, a whole number.

        Raises:
            RecipeError: it is something else, less than ``least``, or has more digits than anything that is counted.
        """
        found = self.take(key, default)
        if not re.fullmatch(r"[0-9]{1,15}", str(found)) or int(found) < least:
            raise RecipeError(f"{key}={found!r} is not allowed; use a whole number, {least} or more.")
        return int(found)

    def number(self, key: str, default: float) -> float:
        """A key's value, a finite number, which YAML may have taken for text (``2.0e-5`` without a sign).

        Raises:
            RecipeError: it is something else.
        """
        found = self.take(key, default)
        try:
            number = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"{key}={found!r} is not allowed; use a number.")
        return number

    def size(self, letter: str) -> int:
        """How many ranks a dimension of the layout has: ``dp``, ``tp``, ``pp``, ``cp`` or ``ep``."""
        return self.whole(f"distributed.{letter}_size", 1)


def short_name(value: Any) -> Any:
    """The last part of a dotted target."""
    return value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else value


def _leaves(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key; a section that is empty or none is one."""
    for key, value in data.items():
        where = f"{path}{key}"
        section = any(known.startswith(f"{where}.") for known in KEYS)
        if section and where not in KEYS and _plain(value) is None:
            continue  # a section that is left out
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}.")
        else:
            yield where, value


def _plain(value: Any) -> Any:
    """AutoModel's reading of text: ``none`` and numbers; variables of the environment are not filled in."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, str):
        return value if value != {} else None
    if "$" in value:
        raise RecipeError(f"{value}: variables are not expanded; write out the value.")
    if value.lower() in ("none", "null", ""):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
