"""JSON objects that others wrote: each key once, numbers finite and of ordinary length, files of a sane size."""

import json
import math
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import MixtralRecipesError, in_short

_MOST_BYTES = 64 << 20  # a tokenizer's file has 4, an index of the largest Mixtral half of one
_LONGEST_NUMBER = 40  # characters


def read_object(path: Path, error: type[MixtralRecipesError]) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        MixtralRecipesError: it holds no such object; the message says why.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise error(f"{path}: has {size} bytes; {_MOST_BYTES} are the most such a file may have.")
    try:
        return parse_object(path.read_bytes())
    except TypeError as problem:
        raise error(f"{path}: not a JSON object.") from problem
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({in_short(problem)}).") from problem


def parse_object(content: bytes | str) -> dict[str, Any]:
    """The JSON object in some bytes, or in a text.

    Raises:
        ValueError: it is not valid JSON, nested too deep, has a key twice in one object, or a number that is none.
        TypeError: it is JSON, and not an object.
    """
    try:
        found = json.loads(
            content.decode("utf-8-sig") if isinstance(content, bytes) else content,
            object_pairs_hook=once,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_number,
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise TypeError("not a JSON object")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are each given once: a hook of Python's `json`.

    Raises:
        ValueError: one is given twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"field {twice[:80]!r} stands there twice")
    return found


def _whole_number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_LONGEST_NUMBER]} is not a finite number")
    return number
