"""Which modules, layers and experts a scheme adapts.

Modules by Megatron's names; layers and experts as numbers and ranges, as ``peft.layers`` and ``peft.experts`` name
them. Both count from 0, as the names of weights do: ``8-31``, ``0,4-7``, ``24-`` (to the last one), or a list of
numbers.
"""

import functools
import re
from collections.abc import Sequence

from mixtral_recipes.errors import RecipeError, nearest

Numbers = Sequence[int] | str
Ranges = tuple[tuple[int, int | None], ...]
BUSIEST = "busiest:"
ALL_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# What NeMo's scripts leave out, and no adapter is put on here.
_NEVER_ADAPTED = (("exclude_modules", "output_layer"),)
PRESETS = {"all-linear": ALL_LINEAR, "attention": ALL_LINEAR[:2]}


def modules(wanted: Sequence[str] | str, left_out: Sequence[str]) -> tuple[str, ...]:
    """The kinds of layer that ``peft.target_modules`` and ``peft.exclude_modules`` leave, in Megatron's order.

    Raises:
        RecipeError: an unknown name, or none left.
    """
    names = PRESETS.get(wanted, (wanted,)) if isinstance(wanted, str) else tuple(wanted)
    names = ALL_LINEAR if left_out and not names else names  # NeMo's way to say: all but these
    for setting, given in (("target_modules", names), ("exclude_modules", left_out)):
        for name in given:
            if "*" in name or "." in name:
                raise RecipeError(
                    f"peft.{setting} names {name!r}, a pattern; name the kinds of layer ({', '.join(ALL_LINEAR)}), "
                    "and set peft.layers to the numbers of the layers to adapt, e.g. '0,4-7'."
                )
            if name not in ALL_LINEAR and (setting, name) not in _NEVER_ADAPTED:
                raise RecipeError(
                    f"peft.{setting} names {name!r}, which is not a kind of "
                    f"layer.{nearest(name, (*ALL_LINEAR, *PRESETS))}"
                )
    found = tuple(name for name in ALL_LINEAR if name in names and name not in left_out)
    if not found:
        raise RecipeError("peft.target_modules and peft.exclude_modules leave no layer to adapt.")
    return found


def names(numbers: Numbers | None, number: int, setting: str) -> bool:
    """Whether a setting names a number; None names all.

    Raises:
        RecipeError: the setting is not numbers and ranges.
    """
    if numbers is None:
        return True
    if not isinstance(numbers, str):
        return number in numbers
    return any(first <= number and (last is None or number <= last) for first, last in ranges(numbers, setting))


def is_number(text: str) -> bool:
    """Whether a text is a number of a layer or an expert."""
    return bool(re.fullmatch(r"\d{1,9}", text))


@functools.lru_cache(maxsize=64)
def ranges(text: str, setting: str) -> Ranges:
    """Text as (first, last) of each range; last None is open.

    Raises:
        RecipeError: it is not numbers and ranges.
    """
    found: list[tuple[int, int | None]] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        numbers = is_number(first) and (not last or is_number(last))
        if not numbers or (last and int(last) < int(first)):
            raise RecipeError(
                f"{setting}={text!r}: {part.strip()!r} is not a number or range; use e.g. 0,3 or 8-31 or 24-."
            )
        found.append((int(first), int(last) if last else None if dash else int(first)))
    return tuple(found)


def check(numbers: Numbers | None, count: int, setting: str, what: str) -> None:
    """Refuse numbers that a model does not have, or none at all.

    Args:
        numbers: What the setting says.
        count: How many there are.
        setting: Its path, for errors.
        what: What is counted.

    Raises:
        RecipeError: names the number and what there is.
    """
    if numbers is None:
        return
    parts = ranges(numbers, setting) if isinstance(numbers, str) else [(n, n) for n in numbers]
    if not parts:
        raise RecipeError(f"{setting}={numbers!r} names no {what}; leave it out to adapt all of them.")
    worst = max(first if last is None else last for first, last in parts)
    least = min(first for first, _ in parts)
    if worst >= count or least < 0:
        raise RecipeError(
            f"{setting}={numbers!r} names {what} {worst if worst >= count else least}, but the model has "
            f"{count} (0 to {count - 1})."
        )


def busiest_of(text: str) -> int | None:
    """N of ``busiest:N``; None where it is something else.

    Raises:
        RecipeError: N is not a whole number of 1 or more.
    """
    if not text.startswith(BUSIEST):
        return None
    number = text.removeprefix(BUSIEST)
    if not is_number(number) or int(number) < 1:
        raise RecipeError(f"peft.experts={text!r} needs a number of experts per layer, e.g. busiest:4.")
    return int(number)
