"""Which token comes next: greedy, or drawn from a distribution that temperature, top-k and top-p shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError

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
        stop: Texts that end a continuation; they are not part of it.
        seed: Of the draws; each prompt has a stream of its own, whatever it is batched with.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = field(default_factory=tuple)
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("stop", all(self.stop), "no empty text"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RecipeError(f"{name}={getattr(self, name)}: it must be {rule}.")


class Drawn(Protocol):
    """What a next token is chosen for: the tokens so far, how to choose, and random numbers of its own."""

    tokens: list[int]
    sampling: Sampling
    stream: torch.Generator


def stream(seed: int, number: int) -> torch.Generator:
    """Random numbers of a seed; each number has a stream of its own."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


def choose(logits: Tensor, rows: Sequence[Drawn]) -> list[int]:
    """The next token of each row, by its own settings and from its own stream.

    Args:
        logits: [rows, vocabulary].
        rows: What they belong to.
    """
    likeliest = logits.argmax(-1).tolist()
    return [
        token if _is_plain(row.sampling) else _drawn(logits[place].float().cpu(), row)
        for place, (token, row) in enumerate(zip(likeliest, rows, strict=True))
    ]


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature < _LEAST and sampling.repetition_penalty == 1


def _drawn(logits: Tensor, row: Drawn) -> int:
    """A token drawn from logits [vocabulary]."""
    how = row.sampling
    if how.repetition_penalty != 1:
        logits = _penalised(logits, row)
    if how.temperature < _LEAST:
        return int(logits.argmax())
    return int(torch.multinomial(_shaped(logits, how), 1, generator=row.stream))


def _penalised(logits: Tensor, row: Drawn) -> Tensor:
    known = torch.tensor(sorted(set(row.tokens)))
    values, penalty = logits[known], row.sampling.repetition_penalty
    return logits.index_copy(0, known, torch.where(values > 0, values / penalty, values * penalty))


def _shaped(logits: Tensor, how: Sampling) -> Tensor:
    """Probabilities to draw from, [vocabulary]."""
    logits = logits / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -math.inf)
    probabilities = logits.softmax(-1)
    if how.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # of a token, the probability of all likelier ones
        ordered = ordered.masked_fill(before >= how.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return probabilities
