"""Rows that are continued together: they come and go at any step, and none changes what another says.

Every rank keeps the same list of rows, so that all take the same steps without asking each other: what is exchanged is
the new tokens. Each data-parallel rank runs the rows that are placed there.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixtral_recipes.inference.model import InferenceModel, no_numbers
from mixtral_recipes.inference.sampling import NO_TOKEN, Likelihood, Sampling, choose, likelihoods, stream
from mixtral_recipes.inference.text import GrowingText
from mixtral_recipes.models.cached_attention import KeyValueCache

_TOGETHER = 8192  # tokens, padding included, of prompts that are run in one pass


@dataclass
class Continuation:
    """What a model made of a prompt.

    Attributes:
        text: The new text, without special tokens and without the stop text.
        tokens: The new tokens, the one that ended it included.
        finish_reason: ``stop`` (an end token or a stop text) or ``length``, as OpenAI's interface has it.
        prompt_tokens: How many tokens the prompt has.
        likelihoods: Of each new token, if they were asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    likelihoods: list[Likelihood] = field(default_factory=list)


class Row:
    """A prompt, and how far its continuation has come.

    Attributes:
        tokens: The prompt's, and the new ones.
        prompt_tokens: How many the prompt has.
        likelihoods: Of each new token, if the settings ask for them.
        done: The continuation, once it has ended.
        failure: Why there will be none.
    """

    def __init__(
        self,
        model: InferenceModel,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        number: int = 0,
        watched: bool = False,
    ) -> None:
        """Begin a row.

        Args:
            model: Says what ends a text.
            prompt: Token ids, at least one.
            sampling: How tokens are chosen.
            number: Which of the seed's streams of random numbers is drawn from.
            watched: Whether text is wanted as it comes.
        """
        self.tokens = list(prompt)
        self.sampling = sampling
        self.stream = stream(sampling.seed, number)
        self.done: Continuation | None = None
        self.failure: Exception | None = None
        self.prompt_tokens = len(prompt)
        self.likelihoods: list[Likelihood] = []
        self._told = 0
        self._ends = model.end_tokens
        watched = watched or bool(sampling.stop)
        self._text = GrowingText(
            model.tokenizer, sampling.stop, watched=watched, continues=sampling.continues, ends=self._ends
        )

    def take(self, token: int, likelihood: Likelihood | None) -> str:
        """A new token; the text that may be shown since. What goes wrong ends this row alone, on all ranks alike."""
        try:
            return self._grown(token, likelihood)
        except Exception as error:
            self.failure = error
            return ""

    def _grown(self, token: int, likelihood: Likelihood | None) -> str:
        if token == NO_TOKEN:
            raise no_numbers(f"after {len(self.tokens)} tokens the logits")
        self.tokens.append(token)
        if likelihood is not None:
            self.likelihoods.append(likelihood)
        text = self._text
        grown = text.add(token)
        stopped = text.stopped or token in self._ends
        if stopped or len(text.tokens) >= self.sampling.max_new_tokens:
            grown += text.rest()
            reason = "stop" if stopped else "length"
            self.done = Continuation(text.shown, text.tokens, reason, self.prompt_tokens, self.likelihoods)
        return grown

    def untold(self) -> list[Likelihood]:
        """The likelihoods since this was last asked."""
        told, self._told = self._told, len(self.likelihoods)
        return self.likelihoods[told:]


class Batch:
    """The rows that are continued now; all ranks make the same calls."""

    def __init__(self, model: InferenceModel, rows: int, length: int) -> None:
        """Make room.

        Args:
            model: The model.
            rows: The most rows on a data-parallel rank.
            length: The most tokens of a row, new ones included.
        """
        self._model = model
        self._room = rows
        self._cache = KeyValueCache(rows, length)
        self._rows: list[list[Row]] = [[] for _ in range(model.places)]

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    @property
    def free(self) -> int:
        """How many more rows there is room for."""
        return self._room * len(self._rows) - len(self)

    def add(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Take rows in, `fit` for one pass; each gets its first token, and is returned with its first text."""
        placed: list[list[Row]] = [[] for _ in self._rows]
        for row in rows:
            place = min(range(len(placed)), key=lambda place: len(self._rows[place]) + len(placed[place]))
            placed[place].append(row)
        mine, here = placed[self._model.place], self._rows[self._model.place]
        logits = None
        if mine:
            lengths = [len(row.tokens) for row in mine]
            padded = [row.tokens + [0] * (max(lengths) - len(row.tokens)) for row in mine]
            logits = self._model.prompts(torch.tensor(padded), torch.tensor(lengths), self._cache, len(here))
        else:
            self._model.idle()
        for one, new in zip(self._rows, placed, strict=True):
            one += new
        return self._take(logits, placed)

    def step(self) -> list[tuple[Row, str]]:
        """A token more for every row; the rows, each with the text that may be shown since."""
        here = self._rows[self._model.place]
        logits = None
        if here:
            tokens = [row.tokens[-1] for row in here]
            logits = self._model.tokens(tokens, [len(row.tokens) - 1 for row in here], self._cache)
        else:
            self._model.idle()
        return self._take(logits, [list(rows) for rows in self._rows])

    def remove(self, gone: Iterable[Row]) -> None:
        """Let rows go, ended or not."""
        for row in gone:
            for place, rows in enumerate(self._rows):
                if row in rows:
                    index, last = rows.index(row), len(rows) - 1
                    rows[index] = rows[last]
                    rows.pop()
                    if place == self._model.place and index != last:
                        self._cache.move(last, index)
                    if place == self._model.place and row.failure:
                        self._cache.clear(last)

    def _take(self, logits: Tensor | None, rows: list[list[Row]]) -> list[tuple[Row, str]]:
        """Choose the next token of this rank's rows, learn the others', and let go of rows that ended."""
        mine = rows[self._model.place]
        chosen = [] if logits is None else choose(logits, mine)
        everyone = self._model.gathered([*chosen, *[NO_TOKEN] * (self._room - len(chosen))])
        told: list[list[Likelihood | None]] = [[None] * len(part) for part in rows]
        if any(row.sampling.logprobs is not None for part in rows for row in part):
            told = self._model.gathered_objects([] if logits is None else likelihoods(logits, chosen, mine))
        grown = [
            (row, row.take(token, likelihood))
            for part, tokens, likely in zip(rows, everyone, told, strict=True)
            for row, token, likelihood in zip(part, tokens, likely, strict=False)
        ]
        self.remove(row for row, _ in grown if row.done or row.failure)
        return grown


def fit(rows: Iterable[Row], most: int) -> int:
    """How many of the first rows may be run in one pass: not too many tokens, and little of it padding."""
    count, longest, total = 0, 0, 0
    for row in itertools.islice(rows, most):
        longest, total = max(longest, len(row.tokens)), total + len(row.tokens)
        padded = longest * (count + 1)
        if count and (padded > _TOGETHER or padded > 1.5 * total + 64):
            break
        count += 1
    return count
