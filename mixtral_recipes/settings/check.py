"""Checks every setting of a recipe before anything is built: its type, and whether it has an effect.

Configs and the objects built from them are checked alike, so that a value set from Python is held to
the rules an override from the command line is held to.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fiddle as fdl

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings import callbacks
from mixtral_recipes.settings.conformity import annotation, default
from mixtral_recipes.settings.nemo.arguments import rules_of
from mixtral_recipes.settings.nemo.megatron import BESIDE, IDLE_WITHOUT
from mixtral_recipes.settings.nemo.rules import Ignored, Rule, needs, notice, refusal, short, wrong_type
from mixtral_recipes.settings.ranges import out_of_range
from mixtral_recipes.system import private


def check_settings(target: Callable[..., Any], parts: Mapping[Any, Any]) -> list[str]:
    """Refuse a recipe with a setting of a wrong type, or with a value it cannot have.

    Args:
        target: What the recipe calls.
        parts: Its arguments, as configs or as objects.

    Returns:
        The notices about settings that have no effect.

    Raises:
        RecipeError: names every such setting, its value and what it may be.
    """
    refused: list[str] = []
    notices: list[str] = []
    for path, owner, given, built in [("", target, parts, False), *_parts("", parts)]:
        prefix = f"{path}." if path else ""
        refused += [] if built else _missing(prefix, owner, given)
        rules = rules_of(owner)
        for name, value in given.items():
            where = f"{prefix}{name}"
            wrong = wrong_type(annotation(owner, name), where, value)
            if wrong and value is not default(owner, name):  # Megatron's are not always of the type they state
                refused.append(wrong)
            elif secret := _secret(where, value):
                refused.append(secret)
            elif wrong := out_of_range(where, str(name), value) or _alone(owner, prefix, str(name), given):
                refused.append(wrong)
            elif name in rules:
                refused += filter(None, [refusal(rules[name], where, value)])
                if not _is_read(rules[name], parts, target.__name__):
                    notices += filter(None, [notice(rules[name], owner, where, given)])
            else:
                notices += filter(None, [_idle(owner, prefix, str(name), given, built=built)])
    refused += callbacks.refused(getattr(parts.get("trainer"), "callbacks", None))
    if refused:
        raise RecipeError(" ".join(refused))
    return notices


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any, Mapping[Any, Any], bool]]:
    """Every part of a recipe: its path, its class (or function), the settings given, and whether it is built."""
    built = not isinstance(value, fdl.Buildable)
    if isinstance(value, fdl.Buildable):
        target, given = fdl.get_callable(value), dict(fdl.ordered_arguments(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        target = type(value)
        set_later = rules_of(target).keys() & getattr(value, "__dict__", {}).keys()  # NeMo's, on an object of ours
        names = [*(field.name for field in dataclasses.fields(value)), *sorted(set_later)]
        given = {name: getattr(value, name) for name in names}
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _parts(f"{path}.{name}" if path else str(name), item)
        return
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _parts(f"{path}[{number}]", item)
        return
    else:
        return
    yield path, target, given, built
    yield from _parts(path, given)


def _missing(prefix: str, target: Any, given: Mapping[Any, Any]) -> list[str]:
    """Settings without a default that are not given."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # timedelta has none
        return []
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return [
        f"{prefix}{name} is not set; it {needs(annotation(target, name), name)}"
        for name in required
        if name not in given
    ]


def _alone(owner: Any, prefix: str, name: str, given: Mapping[Any, Any]) -> str | None:
    """Why a setting that Megatron takes only beside another one may not stand alone."""
    if name not in (needed := BESIDE.get(owner.__name__, {})) or given[name] in (default(owner, name), []):
        return None
    other, value = needed[name]
    if given.get(other, default(owner, other)) == value:
        return None
    return f"{prefix}{name}={short(given[name])} requires {prefix}{other}={value}."


def _idle(owner: Any, prefix: str, name: str, given: Mapping[Any, Any], *, built: bool) -> str | None:
    """Why a setting has no effect without another one; None where that one was switched off, which says enough."""
    for cls in getattr(owner, "__mro__", ()):
        if name not in (needed := IDLE_WITHOUT.get(cls.__name__, {})):
            continue
        rule = needed[name]
        found = given.get(rule.other, default(owner, rule.other))
        switched_off = not built and rule.other in given and not found
        if given[name] in (default(owner, name), [], None, *rule.quiet) or switched_off:
            return None
        if found in rule.values or (found and not rule.values):
            return None
        wanted = f"{rule.other}={short(rule.values[0])}" if rule.values else rule.other
        return f"{prefix}{name}={short(given[name])} has no effect without {prefix}{wanted}."
    return None


def _secret(where: str, value: Any) -> str | None:
    """Why a setting may not be written down, as recipes are: into YAML, job files, records and reports."""
    if isinstance(value, str) and (address := private.password_in(value)):
        return f"{where}: the address {address} carries a password; leave it out, and set it in the environment."
    if isinstance(value, dict) and where.startswith("log."):
        for name, item in value.items():
            if item and isinstance(name, str) and private.sounds_secret(name):
                return f"{where}.{name} sounds like a secret, and would be recorded; set it in the environment."
            if found := _secret(f"{where}.{name}", item):
                return found
    return None


def _is_read(rule: Rule, parts: Mapping[Any, Any], task: str) -> bool:
    """Whether another argument of the recipe makes an ignored one count."""
    if not isinstance(rule, Ignored) or rule.unless is None:
        return False
    name, value = rule.unless
    return parts.get(name, "data" if task == "pretrain" else None) == value
