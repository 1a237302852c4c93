"""Classes and functions that take NeMo's arguments, in NeMo's order, by the table in `arguments.py`."""

import functools
import inspect
import os
import warnings
from typing import Any

from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.settings.nemo.arguments import CALLS, Call, rules_of
from mixtral_recipes.settings.nemo.rules import Ignored, Renamed, notice, refusal
from mixtral_recipes.system.ranks import launched_rank


def takes_nemos_arguments[T](ours: T) -> T:
    """Let a settings class or a function take all arguments it has in NeMo.

    Those it reads are passed on, under their name here. Of the others one with a value that matters gives a warning,
    or is refused, as the table says.

    Args:
        ours: A dataclass, whose name NeMo's class has, or a function.

    Raises:
        RecipeError: from the decorated call: an argument has a value that is refused.
    """
    assert callable(ours)
    name: str = ours.__name__  # pyright: ignore[reportAttributeAccessIssue]
    call = CALLS.get(name) or Call((), {})
    wrapped: Any = ours.__init__ if isinstance(ours, type) else ours
    own = dict(inspect.signature(wrapped).parameters)
    signature = inspect.Signature(_parameters(own, call, rules_of(ours), is_class=isinstance(ours, type)))
    further = [argument for argument in signature.parameters if argument not in own]
    rests = [one.name for one in own.values() if one.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(wrapped)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        rest = given.pop(rests[0], {}) if rests else {}
        return wrapped(**_judged(ours, name, given, further), **rest)

    called.__dict__["__signature__"] = signature
    if not isinstance(ours, type):
        return called  # pyright: ignore[reportReturnType]
    ours.__init__ = called  # pyright: ignore[reportAttributeAccessIssue]
    ours.__signature__ = _OwnSignature()  # pyright: ignore[reportAttributeAccessIssue]
    return ours  # pyright: ignore[reportReturnType]


class _OwnSignature:
    """The signature of a class as its own ``__init__`` has it, whatever ``__new__`` takes; subclasses have theirs."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _parameters(
    own: dict[str, inspect.Parameter], call: Call, rules: dict[str, Any], *, is_class: bool
) -> list[inspect.Parameter]:
    """NeMo's arguments in NeMo's order, then those it does not name, then ours; all behind ``*`` by name only."""
    found: dict[str, inspect.Parameter] = {}
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if is_class:
        found["self"] = own["self"]
    positional = call.order if call.order and call.order[0] != "*" else (*own, *call.order)
    for name in dict.fromkeys([*positional, "*", *rules, *own]):
        if name == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif name not in found and (name not in own or own[name].kind is not inspect.Parameter.VAR_KEYWORD):
            found[name] = own[name].replace(kind=kind) if name in own else inspect.Parameter(name, kind, default=None)
    found |= {name: one for name, one in own.items() if one.kind is inspect.Parameter.VAR_KEYWORD}
    return list(found.values())


def _judged(ours: Any, name: str, given: dict[str, Any], further: list[str]) -> dict[str, Any]:
    """The arguments that our own class or function takes, of those it was given."""
    rules = rules_of(ours)
    for argument in [argument for argument in given if argument in further]:
        rule, path = rules[argument], f"{name}.{argument}"
        if isinstance(rule, Renamed):
            if rule.to in given:
                raise RecipeError(f"{path} and {name}.{rule.to} are the same setting; set only one of them.")
            given[rule.to] = given.pop(argument)
            continue
        refused = refusal(rule, path, given[argument])
        if refused:
            raise RecipeError(refused)
        told = notice(rule, ours, path, given)
        if told and isinstance(rule, Ignored) and _first_to_know():
            warnings.warn(told, MixtralRecipesWarning, stacklevel=3)
        del given[argument]
    return given


def _first_to_know() -> bool:
    """Whether nobody has told of this recipe's notices: ranks of a job build it again from its configuration."""
    return launched_rank() == 0 and "MIXTRAL_RECIPES_ATTEMPT_DIR" not in os.environ


def not_ours(target: Any) -> set[str]:
    """The arguments a class accepts only for compatibility with NeMo: no setting of ours has their name."""
    rules = rules_of(target)
    parameters = inspect.signature(target).parameters if rules else {}
    fields = getattr(target, "__dataclass_fields__", ())
    return {name for name in rules if name in parameters and name not in fields}
