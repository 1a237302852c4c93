"""Samples that are too long: what of them is cut, and what became of a data set's records."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from mixtral_recipes.errors import DataError

TRUNCATION = {
    "prompt": "the prompt from its start, down to prompt_floor tokens, then the answer's end",
    "end": "the end",
    "drop": "nothing: samples that are too long are left out",
    "stop": "nothing: the first sample that is too long is an error",
}


class Encoded(NamedTuple):
    """A tokenized record.

    Attributes:
        tokens: Its tokens.
        learned: For each, whether it is learned.
        head: Tokens at the beginning that are never cut: bos, and what a chat template puts before the first message.
        turns: The first token of each turn that is learned.
    """

    tokens: list[int]
    learned: list[bool]
    head: int = 1
    turns: tuple[int, ...] = ()


class Fitted(NamedTuple):
    """A sample that fits.

    Attributes:
        sample: It; None where nothing is left to learn.
        cut: ``prompt``, ``answer`` or neither: what it lost; an answer counts before a prompt.
        turns: Turns that are learned, in part or whole.
        removed: The first token that was removed from the prompt, and how many.
        why: Why it is None.
    """

    sample: Encoded | None
    cut: str = ""
    turns: int = 0
    removed: tuple[int, int] = (0, 0)
    why: str = ""


@dataclass(frozen=True)
class Fit:
    """How a sample that is too long is cut. Whatever is learned keeps its start: the tail of an answer teaches nothing.

    Attributes:
        seq_length: Most positions; a sample has one token more.
        truncation: A word of `TRUNCATION`.
        prompt_floor: Tokens of the prompt that are kept; None takes a quarter of ``seq_length``.
    """

    seq_length: int
    truncation: str = "prompt"
    prompt_floor: int | None = None

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATION:
            raise DataError(f"data.truncation={self.truncation!r} is not supported; use {', '.join(TRUNCATION)}.")
        if self.prompt_floor is not None and not 0 <= self.prompt_floor <= self.seq_length:
            raise DataError(
                f"data.prompt_floor={self.prompt_floor} must be between 0 and seq_length={self.seq_length}."
            )

    def __call__(self, encoded: Encoded, where: object = "a sample") -> Fitted:
        """The sample, cut where it must be.

        Raises:
            DataError: it is too long, and ``truncation`` is ``stop``.
        """
        tokens, learned, head, turns = encoded
        if not any(learned[1:]):
            return Fitted(None, why="nothing in it is learned")
        most = self.seq_length + 1
        if len(tokens) <= most:
            return Fitted(encoded, turns=len(turns))
        if self.truncation == "stop":
            raise DataError(
                f"{where}: has {len(tokens)} tokens, {len(tokens) - most} more than seq_length={self.seq_length} "
                "allows; raise it, or set data.truncation."
            )
        if self.truncation == "drop":
            return Fitted(None, why="too long")
        removed = self._from_prompt(encoded) if self.truncation == "prompt" else 0
        kept = Encoded(
            (tokens[:head] + tokens[head + removed :])[:most],
            (learned[:head] + learned[head + removed :])[:most],
            head,
            tuple(turn - removed for turn in turns if turn - removed < most),
        )
        if not any(kept.learned[1:]):
            return Fitted(None, why="nothing to learn within seq_length")
        lost = any(learned[most + removed :])
        return Fitted(kept, "answer" if lost else "prompt", len(kept.turns), (head, removed))

    def _from_prompt(self, encoded: Encoded) -> int:
        """Tokens the prompt loses: as many as make the first turn that is learned fit, if so many can be spared."""
        learned = encoded.learned
        first = learned.index(True, 1)
        end = next((n for n in range(first, len(learned)) if not learned[n]), len(learned))
        floor = self.seq_length // 4 if self.prompt_floor is None else self.prompt_floor
        return max(0, min(end - (self.seq_length + 1), first - encoded.head - floor))


@dataclass
class Tally:
    """What became of the records of a split; counted where it is decided, by `data check` as by a run.

    Attributes:
        records: Records that could be used.
        samples: Those that are trained on.
        tokens: Tokens of the samples.
        learned: Those of them whose loss counts.
        turns: Turns that are learned, in part or whole.
        cut_prompts: Samples whose prompt lost its start.
        cut_answers: Samples that lost something that was to be learned.
        cut_tokens: Tokens that were cut off.
        cut_turns: Turns to be learned that were cut off whole.
        dropped: Usable records that give no sample, by the reason.
        left_alone: Assistant's turns that are not learned, by the reason.
        unused: Fields nothing was read from, with the number of records or turns that have them.
        skipped: Records that could not be used.
    """

    records: int = 0
    samples: int = 0
    tokens: int = 0
    learned: int = 0
    turns: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    cut_tokens: int = 0
    cut_turns: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    left_alone: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    skipped: int = 0

    def add(self, encoded: Encoded, fitted: Fitted) -> None:
        """Count one record."""
        self.records += 1
        if fitted.sample is None:
            self.dropped[fitted.why] += 1
            return
        self.samples += 1
        self.tokens += len(fitted.sample.tokens)
        self.learned += sum(fitted.sample.learned[1:])
        self.turns += fitted.turns
        self.cut_prompts += bool(fitted.removed[1])
        self.cut_answers += fitted.cut == "answer"
        self.cut_tokens += len(encoded.tokens) - len(fitted.sample.tokens)
        self.cut_turns += len(encoded.turns) - fitted.turns

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: dict(v) if isinstance(v := getattr(self, f.name), Counter) else v for f in fields(self)}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Tally":
        """From JSON."""
        counters = {name: Counter(saved[name]) for name in ("dropped", "left_alone", "unused")}
        return cls(**{**saved, **counters})

    def sentences(self, seq_length: int) -> Iterable[str]:
        """What a user should know, a sentence each."""
        yield f"{self.samples:,} samples, {self.tokens:,} tokens, {self.learned:,} learned in {self.turns:,} turn(s)"
        if self.cut_prompts or self.cut_answers:
            yield (
                f"cut to seq_length={seq_length}: {self.cut_prompts:,} prompt(s) at the start, {self.cut_answers:,} "
                f"answer(s) at the end; {self.cut_tokens:,} tokens and {self.cut_turns:,} whole turn(s) lost"
            )
        for why, count in self.dropped.items():
            yield f"{count:,} record(s) left out: {why}"
        for why, count in self.left_alone.items():
            yield f"{count:,} answer(s) not learned: {why}"
        if self.unused:
            yield "not used: " + ", ".join(
                f"{name or 'a column without a name'} ({count:,})" for name, count in sorted(self.unused.items())
            )
