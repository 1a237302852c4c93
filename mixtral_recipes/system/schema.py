"""Plain data that others wrote, held against a type: what does not fit is told by its place, its value and the rule.

A whole number is never taken from true, a list never from text. What a type does not name is let pass: whoever reads a
file says which names it knows.
"""

import re
from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import Meta

from mixtral_recipes.errors import MixtralRecipesError

#: Whole numbers that a double holds exactly: what other programs write is one, and sums of them are.
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
#: Seconds since 1970, up to the last year that a date can name.
Moment = Annotated[float, Meta(ge=0, lt=253_402_300_800)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

_LONGEST_VALUE = 80
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list",
    "object": "a table of names and values", "null": "nothing", "key": "a name",
}  # fmt: skip
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<number>\d+)\]|(?P<any>\[\.\.\.\])")


def typed[T](value: Any, shape: type[T], where: object, error: type[MixtralRecipesError]) -> T:
    """A value as an instance of a type.

    Args:
        value: Plain data, as JSON, TOML or YAML gives it.
        shape: A dataclass, a TypedDict, or any type made of those, of lists and of tables; numbers and texts may be
            annotated with `msgspec.Meta`.
        where: What it stands in, for messages: the file, and the line or table where there is one.
        error: What to raise.

    Raises:
        MixtralRecipesError: it does not fit; the message names the place, the value and the rule.
    """
    try:
        return msgspec.convert(value, shape)
    except (msgspec.ValidationError, ValueError) as problem:  # ValueError: of a dataclass's own checks
        _refuse(value, shape, where, error, str(problem))
    except RecursionError:
        raise error(f"{where}: nested too deeply.") from None


def fits(value: Any, shape: Any) -> bool:
    """Whether a value is one of a type."""
    try:
        msgspec.convert(value, shape)
    except (msgspec.ValidationError, ValueError, RecursionError):
        return False
    return True


def _refuse(value: Any, shape: Any, where: object, error: type[MixtralRecipesError], text: str) -> NoReturn:
    rule, _, place = text.partition(" - at `")
    of_a_name = place.startswith("key` in `")
    steps, found = _followed(value, shape, text, place.removeprefix("key` in `").partition("`")[0])
    missing = re.search(r"missing required field `(\w+)`", rule)
    at = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if missing:
        raise error(f"{where}: {at + '.' if at else ''}{missing[1]} is required but missing.")
    rule = re.sub(r"^Expected |, got `.*|^Object contains", "", rule)
    needed = re.sub(r"`([\w |]+)`", lambda found: " or ".join(_WORDS.get(w, w) for w in found[1].split(" | ")), rule)
    if of_a_name:
        at, found = f"a name in {at}" if at else "a name", list(found)
    if rule.startswith("Invalid enum value"):
        needed = "one of the allowed values"
    shown = repr(found)
    shown = shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."
    raise error(f"{where}: {at + '=' if at else ''}{shown} is not allowed; it must be {needed}.")


def _followed(value: Any, shape: Any, text: str, place: str) -> tuple[list[str | int], Any]:
    """The names and numbers that lead to a place in a value, and what is there; a name that is left open is looked for.

    ``$.files[...].size`` says that an entry is wrong, and not which: the one that is wrong without the others.
    """
    taken: list[str | int] = []
    here = value
    for step in _STEP.finditer(place):
        if step["any"]:
            wrong = (name for name in here if text == _problem_with(value, shape, taken, {name: here[name]}))
            key = next(wrong, None)
            if key is None:
                break
        else:
            key = step["name"] or int(step["number"])
        taken.append(key)
        here = here[key]
    return taken, here


def _problem_with(value: Any, shape: Any, place: list[str | int], instead: Any) -> str:
    """What is wrong with a value that has something else at a place."""
    if not place:
        try:
            msgspec.convert(instead, shape)
        except ValueError as problem:
            return str(problem)
        return ""
    copies = [value]
    for step in place[:-1]:
        copies.append(copies[-1][step])
    for step, holder in zip(reversed(place), reversed(copies), strict=True):
        holder = holder.copy()
        holder[step] = instead
        instead = holder
    return _problem_with(instead, shape, [], instead)
