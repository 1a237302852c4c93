"""A setting's value, from text (an override) or from data (a YAML file), checked against the setting's type.

Text is read by nemo_run's own type parser, extended by what it lacks: ``X | None``, dtypes, enums, named functions.
"""

import collections.abc
import enum
import re
import typing
from typing import Any

import torch
from nemo_run.cli.cli_parser import CLIException, type_parser

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings import classes
from mixtral_recipes.settings import serialization as _serialization  # noqa: F401  # teaches nemo_run X | None
from mixtral_recipes.settings.conformity import conforms, options, takes_functions
from mixtral_recipes.settings.literals import literal
from mixtral_recipes.settings.nemo.rules import needs, short

# nemo_run's parser reads such text as a class to import; ours names classes by the table in `settings.classes` only.
_IMPORTS = ("Config", "Partial", "<Config", "<Partial")


def dtype(text: str, where: str) -> torch.dtype:
    """A dtype by name: ``bfloat16``, ``torch.bfloat16`` or ``bf16``.

    Raises:
        RecipeError: no such dtype.
    """
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    name = text.removeprefix("torch.")
    name = short.get(name, name)
    if name not in classes.DTYPES:
        raise RecipeError(f"{where}={text} is not a dtype; use one of {', '.join(classes.DTYPES)}.")
    return getattr(torch, name)


def parse(text: str, annotation: Any, where: str) -> Any:
    """Read a value from an override's text.

    Args:
        text: What follows the ``=``.
        annotation: The setting's type.
        where: The setting's path, for errors.

    Raises:
        RecipeError: the text is not a value of that type.
    """
    if text.startswith(_IMPORTS):
        raise RecipeError(f"{where}={text}: name the class itself, e.g. {where}=ClassName(setting=value).")
    for option in options(annotation):
        try:
            value = _parse_as(text, option, where)
        except (CLIException, ValueError, RecipeError):
            continue
        if conforms(value, option):
            return value
    raise RecipeError(f"{where}={text} {needs(annotation, where)}")


def _parse_as(text: str, option: Any, where: str) -> Any:
    if option is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError
    if option is torch.dtype:
        return dtype(text, where)
    if takes_functions(option):
        return classes.find(text, "functions", where)
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return enum_member(text, option)
    origin = typing.get_origin(option) or option
    if origin in (list, tuple, dict, collections.abc.Sequence):
        return check(_names(text) or literal(text), option, where)
    if origin is typing.Literal:
        same = [value for value in typing.get_args(option) if str(value) == text.strip("'\"")]
        return same[0] if same else text
    return type_parser.parse(text, option)


def _names(text: str) -> list[str] | None:
    """``[a, b]`` as a shell leaves it of ``['a', 'b']``; None for any other text."""
    if not re.fullmatch(r"\[\s*[A-Za-z_]\w*(\s*,\s*[A-Za-z_]\w*)*\s*\]", text):
        return None
    names = re.findall(r"\w+", text)
    return None if {*names} & {"None", "True", "False"} else names


def enum_member(text: str, kind: type[enum.Enum]) -> enum.Enum:
    """An enum's member by name or value.

    Raises:
        ValueError: no such member.
    """
    name = text.rpartition(".")[2]
    if name in kind.__members__:
        return kind[name]
    for member in kind:
        if str(member.value) == text:
            return member
    raise ValueError(text)


def check(value: Any, annotation: Any, where: str) -> Any:
    """Check a value that came as data, and read it where it is text for something else (YAML reads 1e-4 as text).

    Args:
        value: A value of YAML's kinds, or a config.
        annotation: The setting's type.
        where: The setting's path, for errors.

    Raises:
        RecipeError: it is not a value of that type.
    """
    for option in options(annotation):
        if conforms(value, option):
            return _converted(value, option, where)
    if isinstance(value, str):
        return parse(value, annotation, where)
    raise RecipeError(f"{where}={short(value)} {needs(annotation, where)}")


def _converted(value: Any, option: Any, where: str) -> Any:
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if option is float:
        return float(value)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        element = inner[0] if inner else Any
        return origin(check(item, element, f"{where}[{i}]") for i, item in enumerate(value))
    return value
