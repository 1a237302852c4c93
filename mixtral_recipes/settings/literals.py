"""Python that a user wrote as text: a plain value, or a call whose arguments are plain values."""

import ast
from typing import Any

from mixtral_recipes.errors import RecipeError

_UNREADABLE = (SyntaxError, TypeError, MemoryError, RecursionError)  # what Python raises, beside ValueError


def literal(written: str | ast.expr) -> Any:
    """A plain value.

    Raises:
        ValueError: it is something else.
    """
    try:
        return ast.literal_eval(written)
    except _UNREADABLE as error:
        raise ValueError(written) from error


def expression(text: str) -> ast.expr:
    """Any expression, not evaluated.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.parse(text, mode="eval").body
    except _UNREADABLE as error:
        raise ValueError(text) from error


def arguments(call: ast.Call, where: str, example: str) -> dict[str, Any]:
    """The arguments of a call, by name.

    Args:
        call: The call.
        where: What it belongs to, for errors.
        example: A call with arguments by name, for errors.

    Raises:
        RecipeError: one has no name, or is no plain value.
    """
    found = {}
    for argument in [*call.args, *call.keywords]:
        if not isinstance(argument, ast.keyword) or argument.arg is None:
            raise RecipeError(f"{where}: pass arguments by name, e.g. {example}.")
        try:
            found[argument.arg] = literal(argument.value)
        except ValueError:
            given = f"{argument.arg}={ast.unparse(argument.value)}"
            text = argument.value.id if isinstance(argument.value, ast.Name) else "TEXT"
            raise RecipeError(f"{where}: {given} is not a plain value; put text in quotes: '{text}'.") from None
    return found
