"""What NeMo's SamplingParams ask for."""

from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.evaluation.asked import _for_transformers, sampling_of


def asked(**given: Any) -> Any:
    return SimpleNamespace(**{"temperature": 1.0, "top_k": 0, "top_p": 0.0, "num_tokens_to_generate": 30} | given)


@pytest.mark.parametrize("given", [None, asked(top_k=1), asked(temperature=0.0)])
def test_the_likeliest_tokens(given: Any) -> None:
    found = sampling_of(given)
    assert (found.temperature, found.max_new_tokens) == (0, 30)
    assert _for_transformers(found) is None


def test_draws() -> None:
    found = sampling_of(asked(temperature=0.7, top_k=5, num_tokens_to_generate=None))
    assert found.max_new_tokens == 30
    assert _for_transformers(found) == {"temperature": 0.7, "top_k": 5, "top_p": 1.0}
    assert _for_transformers(sampling_of(asked(top_p=0.9))) == {"temperature": 1.0, "top_k": 0, "top_p": 0.9}


def test_probabilities_are_not_returned() -> None:
    with pytest.raises(RecipeError, match="only texts are returned"):
        sampling_of(asked(return_log_probs=True))
