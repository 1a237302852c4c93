"""Which token comes next: greedy, or drawn from a distribution that temperature, top-k and top-p shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError

NO_TOKEN = -1  # where logits are no numbers
_LEAST = 1e-5  # a temperature below it leaves nothing but the likeliest token, and overflows


@dataclass(frozen=True)
class Sampling:
    """How continuations are made.

    Attributes:
        max_new_tokens: The most tokens a continuation may have.
        temperature: What logits are divided by; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; 0 is all.
        top_p: Draw from the fewest tokens whose probabilities sum to this; 1 is all.
        repetition_penalty: Divides a positive logit of a token that was there before, and multiplies a negative one
            (Keskar et al., arXiv 1909.05858); 1 is none.
        presence_penalty: Taken off the logit of every token the continuation has, as OpenAI defines it; 0 is none.
        frequency_penalty: Taken off as often as the continuation has the token; 0 is none.
        logit_bias: Tokens, and what is added to the logit of each.
        stop: Texts that end a continuation; they are not part of it.
        continues: Whether the text goes on where its prompt's ends: then it keeps the space it begins with, which
            SentencePiece's tokenizers leave out at the start of a text.
        seed: Of the draws; each prompt has a stream of its own, whatever it is batched with.
        logprobs: How many of the likeliest tokens are reported beside each chosen one; None reports none of either.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = field(default_factory=tuple)
    continues: bool = False
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logit_bias", all(-100 <= bias <= 100 for _, bias in self.logit_bias), "from -100 to 100 each"),
            ("stop", all(self.stop), "no empty text"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RecipeError(f"{name}={getattr(self, name)}: it must be {rule}.")


@dataclass(frozen=True)
class Likelihood:
    """How likely a token was, by the model's own logits: before temperature, penalties and what else shapes a draw.

    Attributes:
        token: The chosen one.
        logprob: Its log-probability.
        likeliest: The likeliest tokens there with theirs, best first.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Drawn(Protocol):
    """What a next token is chosen for: the tokens so far, how to choose, and random numbers of its own."""

    tokens: list[int]
    prompt_tokens: int
    sampling: Sampling
    stream: torch.Generator


def stream(seed: int, number: int) -> torch.Generator:
    """Random numbers of a seed; each number has a stream of its own."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def choose(logits: Tensor, rows: Sequence[Drawn]) -> list[int]:
    """The next token of each row, by its own settings and from its own stream; `NO_TOKEN` where there can be none.

    Args:
        logits: [rows, vocabulary].
        rows: What they belong to.
    """
    greatest, likeliest = (found.tolist() for found in logits.max(-1))  # NaN is greater than any number
    chosen = []
    for place, row in enumerate(rows):
        if not math.isfinite(greatest[place]):
            chosen.append(NO_TOKEN)
        elif _is_plain(row.sampling):
            chosen.append(likeliest[place])
        else:
            chosen.append(_drawn(logits[place].float().cpu(), row))
    return chosen


def likelihoods(logits: Tensor, chosen: Sequence[int], rows: Sequence[Drawn]) -> list[Likelihood | None]:
    """How likely the chosen token of each row was; None where its settings do not ask.

    Args:
        logits: [rows, vocabulary].
        chosen: A token for each row.
        rows: What they belong to.
    """
    found: list[Likelihood | None] = [None] * len(rows)
    for place, (token, row) in enumerate(zip(chosen, rows, strict=True)):
        if (count := row.sampling.logprobs) is None or token == NO_TOKEN:
            continue
        known = logits[place].float().log_softmax(-1)
        best = known.topk(min(count, len(known)))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found[place] = Likelihood(token, float(known[token]), tuple(likeliest))
    return found


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature < _LEAST and not _is_adjusted(sampling)


def _is_adjusted(how: Sampling) -> bool:
    return how.repetition_penalty != 1 or bool(how.presence_penalty or how.frequency_penalty or how.logit_bias)


def _drawn(logits: Tensor, row: Drawn) -> int:
    """A token drawn from logits [vocabulary]."""
    how = row.sampling
    if _is_adjusted(how):
        logits = _adjusted(logits, row)
    if how.temperature < _LEAST:
        return int(logits.argmax())
    sums = _shaped(logits, how).cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(1, dtype=torch.float64, generator=row.stream) * sums[-1]
    return int(torch.searchsorted(sums, drawn, right=True))  # torch.multinomial takes a random number for each token


def _adjusted(logits: Tensor, row: Drawn) -> Tensor:
    """Logits [vocabulary] with the row's penalties and biases."""
    how = row.sampling
    known = torch.tensor(row.tokens)
    values, penalty = logits[known], how.repetition_penalty
    logits = logits.index_copy(0, known, torch.where(values > 0, values / penalty, values * penalty))
    if how.logit_bias:
        tokens, biases = zip(*how.logit_bias, strict=True)
        logits.index_add_(0, torch.tensor(tokens), torch.tensor(biases, dtype=logits.dtype))
    said, counts = known[row.prompt_tokens :].unique(return_counts=True)
    logits[said] -= how.presence_penalty + how.frequency_penalty * counts
    return logits


def _shaped(logits: Tensor, how: Sampling) -> Tensor:
    """Probabilities to draw from, [vocabulary]."""
    logits = logits / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -math.inf)
    probabilities = logits.softmax(-1)
    if how.top_p < 1:
        ordered, places = _likeliest(probabilities, how.top_p)
        before = ordered.cumsum(-1) - ordered  # of a token, the probability of all likelier ones
        ordered = ordered.masked_fill((before >= how.top_p) & (before > 0), 0)  # in its type top_p may be 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return probabilities


def _likeliest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The greatest of probabilities [vocabulary] that make up a share of 1, or a few more, best first; their places.

    To sort all of a vocabulary takes longer than a small model's step.
    """
    count = 64
    while True:
        found = probabilities.topk(min(count, len(probabilities)))
        if count >= len(probabilities) or found.values.sum() >= share:
            return found.values, found.indices
        count *= 8
