"""TOML that others wrote: of a sane size and depth, numbers finite and of ordinary length."""

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import MixtralRecipesError, in_short
from mixtral_recipes.system.json_files import LONGEST_NUMBER, finite_number, is_deeper
from mixtral_recipes.system.pointers import refuse_pointer

_MOST_BYTES = 1 << 20
_DEEPEST = 20
_LONG_NUMBER = re.compile(rf"(?<![\w\"'.-])[+-]?\d[\d_]{{{LONGEST_NUMBER},}}|(?<!\w)0[xob][0-9a-fA-F_]{{160,}}")


def read_table(path: Path, error: type[MixtralRecipesError]) -> dict[str, Any]:
    """The table in a TOML file.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        MixtralRecipesError: there is no such file, or it is not plain data of a sane size; the message says which.
        OSError: it cannot be read.
    """
    refuse_pointer(path, error)
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file.") from None
    if len(raw) > _MOST_BYTES:
        raise error(f"{path} is too large; the limit is {_MOST_BYTES} bytes.")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        if found := _LONG_NUMBER.search(text):
            raise ValueError(f"a number of {len(found[0])} digits")
        table = tomllib.loads(text, parse_float=finite_number)
    except RecursionError:
        raise error(f"{path}: nested too deeply.") from None
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}:{line}: not UTF-8 ({problem.reason}).") from None
    except ValueError as problem:
        raise error(f"{path}: not TOML ({in_short(problem)}).") from None
    if is_deeper(table, _DEEPEST):
        raise error(f"{path}: nested too deeply.")
    return _with_dates_as_text(table)


def _with_dates_as_text(value: Any) -> Any:
    """The same, with each date as it is written: nothing here is one, and a name may look like one."""
    if isinstance(value, dict):
        return {name: _with_dates_as_text(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_dates_as_text(inner) for inner in value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value
