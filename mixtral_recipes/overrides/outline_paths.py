"""Dotted overrides applied to a recipe in outline (`recipes/outline.py`), without torch.

A setting that memory and time do not depend on is known by its path and then left alone. What an outline cannot hold
(a part named by its class), or has no such path, is for the whole recipe: `NeedsRecipe`.
"""

import contextlib
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides.completion import PATHS
from mixtral_recipes.settings.literals import literal
from mixtral_recipes.settings.ranges import out_of_range

_OVERRIDE = re.compile(r"([A-Za-z_][\w.\[\]]*)([+\-*/|&]?=)(.*)", re.DOTALL)
_WORD = re.compile(r"[\w.:/+-]*")  # anything else the whole recipe's parser reads: `[a, b]` of bare names
_WHOLE_PARTS = (
    *("data", "model", "trainer", "optim", "log", "resume", "peft"),
    *("model.tokenizer", "trainer.callbacks", "trainer.plugins"),
)


class NeedsRecipe(Exception):
    """An override that only the whole recipe can take."""


def apply(outline: Any, overrides: Iterable[str]) -> None:
    """Change an outline.

    Args:
        outline: The recipe in outline.
        overrides: Texts such as ``data.micro_batch_size=2``.

    Raises:
        RecipeError: a text that is not an override, or a value of the wrong type.
        NeedsRecipe: an override that needs the whole recipe, which also handles unknown names.
    """
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if not match:
            raise RecipeError(f"{text!r} is not a setting; use path=value, e.g. trainer.max_steps=20.")
        path, operator, value = match.groups()
        if operator != "=" or "[" in path or "(" in value or path in _WHOLE_PARTS or path not in PATHS:
            raise NeedsRecipe
        if wrong := out_of_range(path, path.rpartition(".")[2], _number(value)):
            raise RecipeError(wrong)
        _set(outline, path, value, text)


def _number(text: str) -> Any:
    """A text as the number or the list that a whole recipe would read in it; None where it is neither."""
    for read in (int, float, literal):
        with contextlib.suppress(ValueError):
            return read(text)
    return None


def _set(outline: Any, path: str, value: str, text: str) -> None:
    *parents, name = path.split(".")
    holder = outline
    for parent in parents:
        if not hasattr(holder, parent):
            return  # a part that decides nothing here
        holder = getattr(holder, parent)
        if holder is None:
            if parent == "peft":
                raise RecipeError(f"{text}: this recipe trains all weights; use --peft lora first.")
            raise NeedsRecipe
    if hasattr(holder, name):
        setattr(holder, name, _value(value, getattr(holder, name)))


def _value(value: str, old: Any) -> Any:
    if value.lower() in ("none", "null"):
        return None
    if value.lower() in ("true", "false"):
        read: Any = value.lower() == "true"
    else:
        try:
            read = literal(value)
        except ValueError:
            if not _WORD.fullmatch(value):
                raise NeedsRecipe from None
            read = value
    if isinstance(old, SimpleNamespace):
        raise NeedsRecipe
    kind = type(old)
    if old is not None and not isinstance(read, kind) and not (kind is list and isinstance(read, str | tuple)):
        raise NeedsRecipe  # which knows its type
    if kind is int and isinstance(read, bool):
        raise NeedsRecipe
    return read
