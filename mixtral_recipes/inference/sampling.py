"""Which token comes next: greedy, or drawn from a distribution that temperature, top-k and top-p shape."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError


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
            ("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RecipeError(f"{name}={getattr(self, name)}: it must be {rule}.")


class Sampler:
    """Chooses the next token of several sequences, each by its own stream of random numbers."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        """Start a batch.

        Args:
            sampling: How tokens are chosen.
            numbers: Each sequence's number among all prompts; its stream depends on it and the seed alone.
        """
        self._sampling = sampling
        self._streams = [torch.Generator().manual_seed((sampling.seed * 1_000_003 + n) % 2**63) for n in numbers]

    def next(self, logits: Tensor, seen: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """The next token of some of the sequences; the others' streams stay as they are.

        Args:
            logits: [sequences, vocabulary].
            seen: The tokens so far, prompt included, of those sequences whose next token is wanted, by their place.
        """
        if not seen:
            return {}
        logits = logits[list(seen)]
        logits = logits.float().cpu()
        if self._sampling.repetition_penalty != 1:
            rows = zip(logits, seen.values(), strict=True)
            logits = torch.stack([self._penalised(row, tokens) for row, tokens in rows])
        if self._sampling.temperature == 0:
            return dict(zip(seen, logits.argmax(-1).tolist(), strict=True))
        return {
            place: int(torch.multinomial(row, 1, generator=self._streams[place]))
            for place, row in zip(seen, self._shaped(logits), strict=True)
        }

    def _penalised(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        known = torch.tensor(sorted(set(tokens)))
        penalty = self._sampling.repetition_penalty
        values = logits[known]
        return logits.index_copy(0, known, torch.where(values > 0, values / penalty, values * penalty))

    def _shaped(self, logits: Tensor) -> Tensor:
        """Probabilities to draw from, [sequences, vocabulary]."""
        logits = logits / self._sampling.temperature
        if 0 < self._sampling.top_k < logits.shape[-1]:
            least = logits.topk(self._sampling.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        probabilities = logits.softmax(-1)
        if self._sampling.top_p < 1:
            ordered, places = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # of a token, the probability of all likelier ones
            ordered = ordered.masked_fill(before >= self._sampling.top_p, 0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
        return probabilities
