"""Whether a value is of a setting's type: values from text, from files and from Python are held to the same rules."""

import collections.abc
import dataclasses
import enum
import functools
import types
import typing
from pathlib import Path
from typing import Any

import fiddle as fdl

from mixtral_recipes.settings import classes

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "a value",
}


@functools.cache
def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target)
    except (TypeError, NameError):
        return {}


def annotation(target: Any, name: str) -> Any:
    """The type of a class's or function's setting; Any where none is stated."""
    return float if target.__name__ == "timedelta" else _hints(target).get(name, Any)


def default(target: Any, name: str) -> Any:
    """A setting's default; `dataclasses.MISSING` where there is none."""
    for field in dataclasses.fields(target) if dataclasses.is_dataclass(target) else ():
        if field.name == name:
            return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.MISSING


def options(wanted: Any) -> list[Any]:
    """The types a setting allows: None first, text last, since everything is text.

    Path comes behind text: a recipe holds the text, which every file format can.
    """
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        found = list(typing.get_args(wanted))
        return sorted(found, key=lambda option: (option is Path, option is str, option is not type(None)))
    return [wanted]


def conforms(value: Any, option: Any) -> bool:
    """Whether a value is of a type, as far as configs go: a config of a class counts as the class."""
    if option is Any or isinstance(option, str | typing.TypeVar):
        return True
    if option is None or option is type(None):
        return value is None
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, item) for item in inner)
    if origin is typing.Literal:
        return value in inner
    if isinstance(value, fdl.Buildable):
        target = fdl.get_callable(value)
        if isinstance(value, fdl.Partial):  # makes a function, not the object
            return takes_functions(option)
        return isinstance(origin, type) and isinstance(target, type) and issubclass(target, origin)
    if takes_functions(option):
        return callable(value)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(conforms(item, inner[0]) for item in value if inner)
    if option is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(origin, type) and isinstance(value, origin)


def takes_functions(option: Any) -> bool:
    """Whether a type is a function's."""
    return (typing.get_origin(option) or option) in (collections.abc.Callable, typing.Callable)


def describe(wanted: Any) -> str:
    """A type in words."""
    parts = []
    for option in options(wanted):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is typing.Literal:
            parts.append("one of " + ", ".join(map(str, inner)))
        elif isinstance(origin, type) and issubclass(origin, enum.Enum):
            parts.append("one of " + ", ".join(origin.__members__))
        elif takes_functions(option):
            parts.append("one of " + ", ".join(classes.FUNCTIONS))
        elif origin in (list, tuple):
            parts.append("a list")
        else:
            parts.append(_WORDS.get(option) or f"a {getattr(option, '__name__', option)}")
    return " or ".join(dict.fromkeys(parts))
