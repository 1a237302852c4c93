"""An option without effect is refused by its name."""

from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli.options.evaluation import EvaluationOptions
from mixtral_recipes.errors import RecipeError

TASKS: dict[str, Any] = {"tasks": "hellaswag"}
TEXT: dict[str, Any] = {"perplexity": Path(__file__)}


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (TASKS | {"questions": 5}, "--questions"),
        (TEXT | {"loss": False}, "--no-loss"),
        (TASKS | {"max_new_tokens": 5}, "--max-new-tokens"),
        (TASKS | {"window": 5}, "--window"),
        (TEXT | {"limit": 5}, "--limit"),
    ],
)
def test_without_effect(given: dict[str, Any], option: str) -> None:
    with pytest.raises(RecipeError, match=f"{option} has no effect without --"):
        EvaluationOptions(**given).asked()


def test_with_effect() -> None:
    for given in ({}, {"data": "squad"}, TEXT | {"data": "squad"}):
        asked = EvaluationOptions(**given, questions=5, loss=False, max_new_tokens=3).asked()
        assert (asked.questions, asked.loss, asked.max_new_tokens) == (5, False, 3)
