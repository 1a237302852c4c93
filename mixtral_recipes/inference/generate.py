"""Continuations of prompts: batches of uneven prompts, token by token, all ranks in step.

Prompts of a batch start together where the shortest ends; a longer prompt's own tokens take the place of drawn ones
until it is through. So positions are exact, nothing is padded, and no attention mask is needed: what a model computes
does not depend on what it is batched with. Prompts of similar length are batched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Sampler, Sampling
from mixtral_recipes.system.ranks import gathered

OnText = Callable[[int, str], None]  # a prompt's number, and what its continuation grew by


@dataclass
class Continuation:
    """What a model made of a prompt.

    Attributes:
        text: The new text, without special tokens and without the stop text.
        tokens: The new tokens, the one that ended it included.
        finish_reason: ``stop`` (an end token or a stop text) or ``length``, as OpenAI's interface has it.
        prompt_tokens: How many tokens the prompt has.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0


def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_text: OnText | None = None,
) -> list[Continuation]:
    """Continue prompts; all ranks call it together with the same prompts, and all get every continuation.

    Args:
        model: The model.
        prompts: Token ids of each, at least one.
        sampling: How tokens are chosen.
        batch_size: The most prompts that are continued together on a data-parallel rank.
        on_text: Called with text as it comes, for the prompts of this rank.

    Raises:
        RecipeError: a prompt is empty, or longer than the model's positions leave room for.
    """
    longest = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RecipeError(f"prompt {number + 1} has no token; give it some text.")
        if len(prompt) + sampling.max_new_tokens > longest:
            raise RecipeError(
                f"prompt {number + 1} has {len(prompt)} tokens and {sampling.max_new_tokens} new ones are asked for, "
                f"but the model has max_position_embeddings={longest}; shorten it or lower --max-new-tokens."
            )
    mine = sorted(model.share(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    found: dict[int, Continuation] = {}
    # Experts' ranks work together, so each rank runs as many batches and steps as the busiest one.
    for turn in range(max(gathered(len(batches)))):
        numbers = batches[turn] if turn < len(batches) else []
        batch = _Batch(model, {number: prompts[number] for number in numbers}, sampling, on_text)
        batch.run()
        found |= batch.done
    everyone = {number: one for part in gathered(found) for number, one in part.items()}
    return [everyone[number] for number in range(len(prompts))]


class _Batch:
    """Prompts that are continued together on this rank."""

    def __init__(
        self, model: InferenceModel, prompts: dict[int, Sequence[int]], sampling: Sampling, on_text: OnText | None
    ) -> None:
        self._model = model
        self._prompts = [list(prompt) for prompt in prompts.values()] or [[0]]  # one for a rank with nothing to do
        self._numbers = list(prompts) or [-1]
        self._sampling = sampling
        self._sampler = Sampler(sampling, self._numbers)
        watched = on_text is not None or bool(sampling.stop)
        self._texts = [_Text(model.tokenizer, sampling.stop, watched=watched) for _ in self._prompts]
        self._on_text = on_text
        self._open = [bool(prompts)] * len(self._prompts)
        self.done: dict[int, Continuation] = {}

    def run(self) -> None:
        """Step until every rank's sequences are through."""
        rows = [list(prompt) for prompt in self._prompts]
        shortest = min(map(len, rows))
        room = max(map(len, rows)) + self._sampling.max_new_tokens
        cache = self._model.cache(len(rows), room)
        logits = self._model.step(torch.tensor([row[:shortest] for row in rows]), cache)
        at = shortest
        while True:
            due = {index: row for index, row in enumerate(rows) if at >= len(row)}
            for index, token in self._sampler.next(logits, due).items():
                rows[index].append(token)
                if self._open[index]:
                    self._take(index, token)
            if not self._model.any(any(self._open)):
                return
            if not any(self._open):
                cache.sequence_len_offset = at - 1  # through here; others are not, and need this rank's experts
                at -= 1
            logits = self._model.step(torch.tensor([[row[at]] for row in rows]), cache)
            at += 1

    def _take(self, index: int, token: int) -> None:
        """A new token of an open sequence."""
        text = self._texts[index]
        grown = text.add(token)
        number = self._numbers[index]
        stopped = text.stopped or token in self._model.end_tokens
        full = len(text.tokens) >= self._sampling.max_new_tokens
        if stopped or full:
            self._open[index] = False
            grown += text.rest()
            reason = "stop" if stopped else "length"
            self.done[number] = Continuation(text.shown, text.tokens, reason, len(self._prompts[index]))
        if grown and self._on_text is not None:
            self._on_text(number, grown)


class _Text:
    """The text of tokens as they come: shown once no further token can change it, and up to a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, watched: bool = True) -> None:
        """Begin a text.

        Args:
            tokenizer: Turns tokens into text.
            stop: What ends it.
            watched: Whether text is wanted as it comes; else all of it is decoded once, at the end.
        """
        self._watched = watched
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = max(map(len, stop), default=1) - 1  # these last characters may begin a stop text
        self.tokens: list[int] = []
        self.shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; what may be shown now."""
        self.tokens.append(token)
        if not self._watched:
            return ""
        whole = self._decoded()
        places = [place for text in self._stop if (place := whole.find(text)) >= 0]
        if places:
            self.stopped = True
            return self._show(whole[: min(places)])
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a character whose bytes are not all there
        return self._show(whole[: max(len(whole) - self._held, len(self.shown))])

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._show(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _show(self, upto: str) -> str:
        grown = upto[len(self.shown) :]
        self.shown = upto if len(upto) > len(self.shown) else self.shown
        return grown
