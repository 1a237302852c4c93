"""Drawing tokens, against the definitions and against transformers' own processors."""

from dataclasses import dataclass

import pytest
import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.sampling import (
    NO_TOKEN,
    Likelihood,
    Sampling,
    _adjusted,
    _shaped,
    choose,
    likelihoods,
    stream,
)


@dataclass
class Row:
    tokens: list[int]
    sampling: Sampling
    number: int = 0
    prompt_tokens: int = 1

    def __post_init__(self) -> None:
        self.stream = stream(self.sampling.seed, self.number)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("top_p", [5e-324, 0.05, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_shapes_as_transformers_does(temperature: float, top_k: int, top_p: float, vocabulary: int) -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(min(top_k, vocabulary))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = torch.stack([_shaped(row, sampling) for row in logits])
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.softmax(-1))


def test_repetition_penalty_is_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    seen = [[1, 2, 2, 7], [0, 5, 9, 29]]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), logits.clone())
    rows = [Row(tokens, Sampling(repetition_penalty=1.7)) for tokens in seen]
    found = torch.stack([_adjusted(row, one) for row, one in zip(logits, rows, strict=True)])
    torch.testing.assert_close(found, expected)
    assert choose(logits, rows) == expected.argmax(-1).tolist()


def test_penalties_count_what_was_said_and_biases_are_added() -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    how = Sampling(presence_penalty=0.5, frequency_penalty=-0.25, logit_bias=((4, 100), (9, -2)))
    row = Row([3, 3, 5, 6, 6, 6], how, prompt_tokens=3)  # the prompt's own tokens do not count
    expected = logits[0].clone()
    expected[6] -= 0.5 - 3 * 0.25
    expected[4] += 100
    expected[9] -= 2
    before = logits.clone()
    torch.testing.assert_close(_adjusted(logits[0], row), expected)
    torch.testing.assert_close(logits, before)
    assert choose(logits, [row]) == [4]
    for alone in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"logit_bias": ((1, -100),)}):
        likeliest = torch.zeros(1, 3)
        likeliest[0, 1] = 1
        assert choose(likeliest, [Row([0, 1], Sampling(**alone))]) != [1]


def test_likelihoods_are_of_the_models_own_logits() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    rows = [Row([1], Sampling(temperature=9.0, top_k=1, logprobs=count)) for count in (2, None, 0)]
    first, none, alone = likelihoods(logits, [7, 1, 2], rows)
    known = logits.log_softmax(-1)
    assert none is None
    assert alone == Likelihood(2, known[2, 2].item(), ())
    assert first is not None
    assert (first.token, first.logprob) == (7, known[0, 7].item())
    ordered = known[0].sort(descending=True)
    assert first.likeliest == tuple(zip(ordered.indices[:2].tolist(), ordered.values[:2].tolist(), strict=True))


def test_a_prompts_draws_depend_on_its_number_and_the_seed_alone() -> None:
    logits = torch.zeros(1, 1000)
    sampling = Sampling(temperature=1.0, seed=5)
    alone = [choose(logits, [Row([1], sampling, 3)])[0] for _ in range(2)]
    together = choose(logits.expand(2, -1), [Row([1], sampling, 2), Row([1], sampling, 3)])
    assert alone == [together[1]] * 2
    assert together[0] != together[1]


def test_each_row_is_drawn_by_its_own_settings() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    settings = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_k=1)]
    greedy = logits.argmax(-1).tolist()
    together = choose(logits, [Row([1], one) for one in settings])
    assert together == [choose(logits[n : n + 1], [Row([1], one)])[0] for n, one in enumerate(settings)]
    assert together[0] == greedy[0]
    assert together[2] == greedy[2]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3, 0.0])
    row = Row([1], Sampling(temperature=1.0, seed=2))
    drawn = torch.tensor([choose(probabilities.log()[None], [row])[0] for _ in range(4000)])
    torch.testing.assert_close(drawn.bincount(minlength=6) / 4000, probabilities, atol=0.02, rtol=0)


def test_of_logits_that_are_no_numbers_no_token_is_chosen() -> None:
    logits = torch.zeros(4, 10)
    logits[0, 3], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    for sampling in (Sampling(logprobs=1), Sampling(temperature=1.0, top_p=0.5, logprobs=1)):
        rows = [Row([1], sampling) for _ in range(4)]
        chosen = choose(logits, rows)
        assert chosen[:3] == [NO_TOKEN] * 3
        assert chosen[3] >= 0
        assert [one is None for one in likelihoods(logits, chosen, rows)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1: it must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0: it must be above 0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it must be at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"presence_penalty": 3}, "presence_penalty=3: it must be from -2 to 2"),
        ({"logit_bias": ((1, 200.0),)}, "logit_bias="),
    ],
)
def test_what_no_value_may_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sampling(**settings)
