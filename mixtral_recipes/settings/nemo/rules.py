"""What may become of an argument: it is read under its own or another name, it has no effect, or it has one value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mixtral_recipes.errors import nearest

# What Lightning and NeMo allow of a trainer beside whole numbers, and what to write instead.
INSTEAD = {
    "val_check_interval": "set the number of steps between validations (0 for none), not a fraction of an epoch",
    "devices": "set the number of processes per node",
    "limit_val_batches": "use null for the whole set, as with Lightning's 1.0",
    "limit_test_batches": "use null for the whole set, as with Lightning's 1.0",
}


@dataclass(frozen=True)
class Ignored:
    """Nothing reads it: a value other than the default gives a notice.

    Attributes:
        why: What happens instead.
        quiet: Further values that give no notice, those of NeMo's recipes among them.
        beside: Another setting of the same part, whose value this one may repeat.
        unless: An argument of the recipe, and the value of it with which this one is read after all.
    """

    why: str
    quiet: tuple[Any, ...] = ()
    beside: str | None = None
    unless: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Only:
    """It has one value; any other is refused.

    Attributes:
        value: The value.
        why: What replaces the others.
        also: Other spellings of that value.
    """

    value: Any
    why: str
    also: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Renamed:
    """It is read under another name.

    Attributes:
        to: The name here.
    """

    to: str


@dataclass(frozen=True)
class Base:
    """A class that others derive from, or that annotations name; an empty one stands for it.

    Attributes:
        why: What it is not needed for.
    """

    why: str


@dataclass(frozen=True)
class Keys:
    """A mapping of which only some keys are read: any other key gives a notice."""

    known: tuple[str, ...]


Rule = Ignored | Only | Renamed | Keys


def each[T](rule: T, names: str) -> dict[str, T]:
    """One rule for several names, which blanks separate."""
    return dict.fromkeys(names.split(), rule)


def refusal(rule: Rule, path: str, value: Any) -> str | None:
    """Why a value is refused; None where it is not."""
    if not isinstance(rule, Only):
        return None
    for allowed in (rule.value, *rule.also):
        if _same(value, allowed) or getattr(value, "__name__", None) == allowed is not None:
            return None
    return f"{path}={short(value)} is not supported (only {rule.value!r} is): {rule.why}."


def notice(rule: Rule, target: Any, path: str, given: Mapping[Any, Any]) -> str | None:
    """The notice for a value that is not read; None if there is nothing to say.

    Args:
        rule: The argument's rule.
        target: The class it belongs to.
        path: Its dotted path, whose last part is its name.
        given: The values of the class's arguments.
    """
    name = path.rpartition(".")[2]
    value = given[name]
    if isinstance(rule, Keys):
        unknown = sorted(set(value or {}) - set(rule.known))
        verb = "has" if len(unknown) == 1 else "have"
        return f"{path}: {', '.join(unknown)} {verb} no effect.{nearest(unknown[0], rule.known)}" if unknown else None
    if not isinstance(rule, Ignored):
        return None
    from mixtral_recipes.settings.conformity import default

    silent = [default(target, name), *rule.quiet]
    if rule.beside is not None:
        silent.append(given.get(rule.beside, dataclasses.MISSING))
    if any(_same(value, quiet) for quiet in silent):
        return None
    return f"{path}={short(value)} has no effect: {rule.why}."


def _same(value: Any, other: Any) -> bool:
    if isinstance(other, str) and other.startswith("torch."):  # a dtype; `migrate` reads the rules without torch
        return str(value) == other
    return value is other or (isinstance(value, bool) == isinstance(other, bool) and bool(value == other))


def short(value: Any) -> str:
    """A value in a line, for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong_type(wanted: Any, where: str, value: Any) -> str | None:
    """Why a value is not of a setting's type; None where it is.

    Args:
        wanted: The type.
        where: The setting's path.
        value: Its value.
    """
    from mixtral_recipes.settings.conformity import conforms

    if conforms(value, wanted):
        return None
    return f"{where}={short(value)} {needs(wanted, where, _instead(value))}"


def _instead(value: Any) -> str:
    """What to write in place of a value that is often meant well."""
    if isinstance(value, PurePath):
        return "use str(path)"
    if type(value).__module__ == "numpy":
        return "use value.item()"
    return "use run.Config, not run.Partial" if type(value).__name__.lower() == "partial" else ""


def needs(wanted: Any, where: str, instead: str = "") -> str:
    """What a setting may be, as the end of a message.

    Args:
        wanted: Its type.
        where: Its path.
        instead: What to write where the table does not say it.
    """
    from mixtral_recipes.settings.conformity import describe

    instead = INSTEAD.get(where.rpartition(".")[2], instead)
    return f"must be {describe(wanted)}{'; ' if instead else ''}{instead}."
