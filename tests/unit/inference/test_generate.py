"""How much of a prompt a model has room for."""

from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.generate import shortened

MODEL: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))


def test_the_end_of_a_prompt_stays() -> None:
    assert shortened(MODEL, [[1, 2, 3, 4], [5]], 5) == [[2, 3, 4], [5]]
    assert shortened(MODEL, [[1, 2]], 7) == [[2]]


def test_the_first_token_stays_where_training_keeps_it() -> None:
    assert shortened(MODEL, [[1, 2, 3, 4], [5], [6, 7, 8]], 5, head=1) == [[1, 3, 4], [5], [6, 7, 8]]
    assert shortened(MODEL, [[1, 2]], 7, head=1) == [[2]]


@pytest.mark.parametrize("most", [8, 600])
def test_an_answer_without_room_for_any_prompt(most: int) -> None:
    with pytest.raises(RecipeError, match=f"max_gen_toks {most}: the model has 8 positions in total; lower it"):
        shortened(MODEL, [[1, 2]], most, asked_by="max_gen_toks")
