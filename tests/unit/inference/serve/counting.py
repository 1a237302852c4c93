"""A model that needs no weights, for what stands around it."""

from collections.abc import Sequence
from typing import Any

import torch

VOCABULARY = 100


class Counting:
    """Says the number after the last token; NaN after 13, and fails at 77."""

    place, places = 0, 1
    device = torch.device("cpu")
    end_tokens = frozenset({99})

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompts(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: Any, first: int) -> torch.Tensor:
        return self._after(tokens[torch.arange(len(tokens)), lengths - 1].tolist())

    def tokens(self, tokens: Sequence[int], positions: Sequence[int], cache: Any) -> torch.Tensor:
        return self._after(tokens)

    def gathered(self, tokens: list[int]) -> list[list[int]]:
        return [tokens]

    def _after(self, tokens: Sequence[int]) -> torch.Tensor:
        if 77 in tokens:
            raise RuntimeError("a kernel failed")
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in zip(logits, tokens, strict=True):
            row[token + 1] = float("nan") if token == 13 else 1
        return logits


class Words:
    """A tokenizer whose tokens are numbers; one of them breaks it."""

    all_special_ids = (99,)

    def __call__(self, text: str, **named: Any) -> dict[str, list[int]]:
        return {"input_ids": [7]}

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(VOCABULARY)}

    def decode(self, tokens: Sequence[int], **named: Any) -> str:
        if 31 in tokens:
            raise IndexError("31")
        return "".join(f" {token}" for token in tokens)
