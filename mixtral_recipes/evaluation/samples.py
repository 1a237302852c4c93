"""A few held-out questions with what a model says to them, of any data that has questions and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.data.modules.base import DataModule

_QUESTIONS = 3

AFTER, BEFORE, BASE = "after", "before", "base"
COLUMNS = (BASE, BEFORE, AFTER)  # as tables have them; what was before is mostly the base itself, and has one column


@dataclass
class HeldOut:
    """A question of the validation split.

    Attributes:
        prompt: Its tokens, up to where the answer begins.
        question: The same as text.
        expected: The answer that would have been learned.
        answers: What was said, by model (``before``, ``after``, ...).
    """

    prompt: list[int]
    question: str
    expected: str
    answers: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For people and files."""
        said = {name: self.answers[name] for name in COLUMNS if name in self.answers}
        return {"question": self.question, "expected": self.expected} | said


def held_out(data: DataModule, tokenizer: Any) -> list[HeldOut]:
    """Three questions of a data set that was set up, spread evenly over its validation split; none of plain text.

    Of a mixture each source has one at least.

    Args:
        data: The data set.
        tokenizer: What it was set up with.
    """
    if not hasattr(tokenizer, "decode"):
        return []
    splits = [split for source in data.sources_set_up if (split := source.samples("validation")) is not None]
    shares = [_QUESTIONS // len(splits) + (number < _QUESTIONS % len(splits)) for number in range(len(splits))]
    return [
        one for split, share in zip(splits, shares, strict=True) for one in _spread(split, tokenizer, max(share, 1))
    ]


def _spread(samples: Any, tokenizer: Any, count: int) -> list[HeldOut]:
    found = []
    wanted = min(count, len(samples))
    for number in (place * len(samples) // wanted for place in range(wanted)):
        tokens, learned = (list(samples[number][name]) for name in ("tokens", "loss_mask"))
        if not any(learned):
            continue
        begin = learned.index(1) + 1  # the mask says of each token whether the next one is learned
        end = next((at for at in range(begin, len(learned)) if not learned[at]), len(learned)) + 1
        prompt = [int(token) for token in tokens[:begin]]
        if begin > 1:
            found.append(HeldOut(prompt, _text(tokenizer, prompt), _text(tokenizer, tokens[begin:end])))
    return found


def _text(tokenizer: Any, tokens: Sequence[Any]) -> str:
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True).strip()
