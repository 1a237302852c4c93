"""Objects and configs in one recipe: objects that travel as text, and functions that make configs themselves."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

import fiddle as fdl

from mixtral_recipes.settings.classes import OURS, THEIRS


def returns_config[F: Callable[..., Any]](make: F) -> F:
    """Mark a function that returns a config.

    `run.autoconvert` calls it then, where a script has ``plugins=bf16_mixed()``; of any other function it makes a
    config, which holds a config where an object belongs once it is built.
    """
    vars(make)["__auto_config__"] = True
    return make


def as_configs(recipe: Any) -> Any:
    """A copy of a recipe in which every object of a settings class is a config that makes it, and every path is text.

    NeMo's scripts write ``peft=llm.peft.LoRA(dim=64)``.

    Objects of other classes stay what they are: nobody but their class knows what they were made with.
    """
    if isinstance(recipe, fdl.Buildable):
        made = fdl.copy_with(recipe)
        for name, value in fdl.ordered_arguments(recipe).items():
            converted = as_configs(value)
            if converted is not value and isinstance(name, str):
                setattr(made, name, converted)
        return _without_what_follows(made)
    if isinstance(recipe, list):
        return [as_configs(item) for item in recipe]
    if isinstance(recipe, dict):
        return {key: as_configs(value) for key, value in recipe.items()}
    if isinstance(recipe, PurePath):
        return str(recipe)
    if isinstance(recipe, float):  # NumPy's float64 too
        return float(recipe)
    return _config(recipe) if _is_settings(recipe) else recipe


def built(value: Any) -> Any:
    """What a config makes, one inside an object of a settings class too; anything else is left as it is."""
    return fdl.build(as_configs(value)) if _holds_config(value) else value


def _holds_config(value: Any) -> bool:
    if isinstance(value, fdl.Buildable):
        return True
    inner: Iterable[Any] = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return any(map(_holds_config, vars(value).values() if _is_settings(value) else inner))


def _is_settings(value: Any) -> bool:
    return type(value).__name__ in (*OURS, *THEIRS) and dataclasses.is_dataclass(value)


def _config(made: Any) -> Any:
    """The config of an object: its fields that do not come out by themselves."""
    import nemo_run as run

    named = {name: getattr(made, name) for name in getattr(made, "_given", ())}
    fresh = type(made)(**named) if hasattr(made, "_given") else None  # what follows from those is not said again
    given = {}
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and (field.name in named or not _same(value, getattr(fresh, field.name, usual))):
            given[field.name] = as_configs(value)
    return run.Config(type(made), **given)


def _without_what_follows(config: Any) -> Any:
    """A config without the functions that its class makes of its numbers.

    nemo_run makes configs of objects itself where they are arguments of a `run.Partial`, and names every field: of a
    `MixtralConfig` also ``init_method``, which Megatron derives from ``init_method_std`` and which is not text.
    """
    functions = {n: v for n, v in fdl.ordered_arguments(config).items() if isinstance(v, functools.partial)}
    if functions:
        rest = fdl.copy_with(config)
        for name in functions:
            delattr(rest, str(name))
        fresh = fdl.build(rest)
        for name in [name for name, value in functions.items() if _same(value, getattr(fresh, str(name), None))]:
            delattr(config, str(name))
    return config


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, functools.partial) and isinstance(usual, functools.partial):
        return (value.func, value.args, value.keywords) == (usual.func, usual.args, usual.keywords)
    return value is usual or (type(value) is type(usual) and bool(value == usual))
