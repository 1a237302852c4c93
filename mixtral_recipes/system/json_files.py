"""JSON objects that others wrote: each key once, numbers finite and of ordinary length, files of a sane size."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import MixtralRecipesError, in_short
from mixtral_recipes.system.pointers import refuse_pointer

MOST_BYTES = 64 << 20  # a tokenizer's file has 4, an index of the largest Mixtral half of one
_MOST_VALUES = 3_000_000  # a tokenizer's file has 0.3 million
_DEEPEST = 100
LONGEST_NUMBER = 40  # characters


def read_object(
    path: Path, error: type[MixtralRecipesError], *, deepest: int = _DEEPEST, finite: bool = True
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        error: What to raise.
        deepest: How many lists and objects may stand in one another.
        finite: Whether every number must be finite; what we measure ourselves may not be.

    Raises:
        MixtralRecipesError: it holds no such object; the message says why.
        OSError: it cannot be read.
    """
    refuse_pointer(path, error)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise error(f"{path} is too large: {size} bytes; the limit is {MOST_BYTES}.")
    try:
        return parse_object(path.read_bytes(), deepest=deepest, finite=finite)
    except TypeError as problem:
        raise error(f"{path}: not a JSON object.") from problem
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({in_short(problem)}).") from problem


def parse_object(content: bytes | str, *, deepest: int = _DEEPEST, finite: bool = True) -> dict[str, Any]:
    """The JSON object in some bytes, or in a text.

    Args:
        content: The JSON.
        deepest: How many lists and objects may stand in one another.
        finite: Whether every number must be finite; what we measure ourselves may not be.

    Raises:
        ValueError: it is not valid JSON, nested too deep, of too many values, has a key twice in one object, or a
            number that is not finite.
        TypeError: it is JSON, and not an object.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    number = finite_number if finite else float
    try:
        found = json.loads(
            text, object_pairs_hook=once, parse_int=whole_number, parse_float=number, parse_constant=number
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise TypeError("not a JSON object")
    if is_deeper(found, deepest):
        raise ValueError("nested too deeply")
    return found


def hash_of(value: Any) -> str:
    """SHA-256 of a value, as JSON spells it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_deeper(value: Any, deepest: int) -> bool:
    """Whether more lists and tables than that stand in one another."""
    level = [value]
    for _ in range(deepest):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list) and inner
        ]
        if not level:
            return False
    return True


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are each given once: a hook of Python's `json`.

    Raises:
        ValueError: one is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"field {twice[:80]!r} appears twice")
    return found


def whole_number(text: str) -> int:
    """A whole number of ordinary length.

    Raises:
        ValueError: it is longer.
    """
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def finite_number(text: str) -> float:
    """A number that is one.

    Raises:
        ValueError: it is not finite.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:LONGEST_NUMBER]} is not a finite number")
    return number
