"""Checks a data set before it is trained on: every record once, in bounded memory.

An *error* is a record that would stop a run (or be left out); a *warning* is one that would train, perhaps not as
meant.
"""

import hashlib
import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mixtral_recipes.data.batches.fit import Encoded, Fitted, Tally
from mixtral_recipes.data.corpus import Encoder
from mixtral_recipes.data.modules.pipeline import Example, Outcome, RecordPipeline, count_fields
from mixtral_recipes.data.recognise import Recognized
from mixtral_recipes.data.records.open import check_trains
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.text_parts import TextPart, documents
from mixtral_recipes.errors import DataError

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_PLACE = re.compile(r"(.*?)(:|: row |\[)(\d+)(\]?)")
_AT_ONCE = 1024
KEPT_PER_KIND = 1000


class Finding(NamedTuple):
    """One thing about one record.

    Attributes:
        level: ``error`` or ``warning``.
        kind: A few words, the same for all findings of a kind.
        where: Its place.
        detail: The rest of the sentence.
    """

    level: str
    kind: str
    where: str
    detail: str


@dataclass
class Report:
    """What `check` found.

    Attributes:
        tallies: What becomes of the records, per split.
        counts: Findings per (level, kind).
        findings: The first `KEPT_PER_KIND` of each kind.
        lengths: Tokens per sample (characters, without a tokenizer) per split.
        unit: ``tokens`` or ``characters``.
        unusable: Records that cannot be used.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    unit: str = "tokens"
    unusable: int = 0

    def add(self, level: str, kind: str, where: str, detail: str = "") -> None:
        """Note a finding."""
        self.counts[level, kind] += 1
        if self.counts[level, kind] <= KEPT_PER_KIND:
            self.findings.append(Finding(level, kind, where, detail))

    def bad(self, error: DataError, record: Any = None) -> None:
        """Note a record that cannot be used; its message begins with its place."""
        self.unusable += 1
        text = str(error).rstrip(".")
        match = _PLACE.match(text)
        where = match[0] if match else text
        self.add("error", "unusable", where, text[len(where) :].lstrip(": "))

    @property
    def records(self) -> dict[str, int]:
        """Usable records per split."""
        return {split: tally.records for split, tally in self.tallies.items()}

    @property
    def usable(self) -> bool:
        """Whether every split has a record that can be used."""
        return all(tally.samples for tally in self.tallies.values())

    @property
    def errors(self) -> int:
        """Records that would stop a run."""
        return sum(count for (level, _), count in self.counts.items() if level == "error")


class Item(NamedTuple):
    """A usable record: what distinguishes it from others, and what became of it."""

    asked: list[str]
    learned: list[str]
    where: Any
    tokens: int
    fitted: Fitted


def check(
    recognized: Recognized,
    tokenizer: Any = None,
    *,
    seq_length: int = 2048,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Check every record of a data set, the way a run would take it.

    Args:
        recognized: The data set, as `recognize` found it.
        tokenizer: Measures lengths in tokens; None measures characters, and cuts nothing.
        seq_length: Positions a sample may take.
        settings: Settings of its data module that a run would have.
        progress: Called with the number of records looked at since the last call.
    """
    if recognized.kind == "corpus":
        raise DataError("an indexed corpus already contains tokens; check the text it was prepared from.")
    report = Report(unit="tokens" if tokenizer is not None else "characters")
    module = recognized.module(seq_length=seq_length, **(settings or {}))
    pipeline = module.pipeline()
    reader = _Records(pipeline, tokenizer, report) if pipeline else _Documents(recognized, tokenizer, report)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special] if tokenizer else ["</s>"]
    look = _Look(report, re.compile("|".join(map(re.escape, special)) or "(?!)"), recognized.kind == "pairs")
    seen = _Seen()
    for split in reader.splits:
        sizes = array("i")
        for item in reader.items(split):
            look(item)
            seen.add(split, item)
            sizes.append(item.tokens)
            progress(1)
        report.lengths[split] = np.frombuffer(sizes, np.int32) if len(sizes) else np.empty(0, np.int32)
        if not report.tallies[split].records and split in reader.own_splits:
            report.add("error", "no usable record", f"{split} split")
        elif split == "train" and not report.tallies[split].samples:
            report.add("error", "nothing to learn", f"{split} split", "all of its records are left out")
    seen.report(report)
    return report


class _Records:
    """What becomes of the records of a data module."""

    def __init__(self, pipeline: RecordPipeline, tokenizer: Any, report: Report) -> None:
        # A bad record is named here, whatever a run would do with it.
        self.pipeline = replace(pipeline, on_bad_record="skip")
        self.tokenizer = tokenizer
        self.report = report
        self.splits, self.own_splits = self.pipeline.splits, self.pipeline.source.splits

    def items(self, split: str) -> Iterator[Item]:
        """The usable records of a split."""
        tally = self.report.tallies[split] = Tally()
        if self.tokenizer is None:
            outcomes = map(partial(_in_characters, tally), self.pipeline.examples(split, self.report.bad))
        else:
            outcomes = self.pipeline.outcomes(split, self.tokenizer, self.report.bad, tally)
        for example, encoded, fitted in outcomes:
            content = example.content
            texts = [list(content.texts(learned=learned)) for learned in (False, True)]
            yield Item(texts[0], texts[1], example.where, len(encoded.tokens), fitted)
        tally.skipped = self.report.unusable - sum(other.skipped for other in self.report.tallies.values())


def _in_characters(tally: Tally, example: Example) -> Outcome:
    """Without a tokenizer, characters stand for tokens, and nothing is too long."""
    sizes = [sum(map(len, example.content.texts(learned=learned))) for learned in (False, True)]
    encoded = Encoded([0] * sum(sizes), [False] * sizes[0] + [True] * sizes[1])
    fitted = Fitted(None, why=example.content.left_out) if example.content.left_out else Fitted(encoded)
    tally.add(encoded, fitted)
    count_fields(example, tally)
    return Outcome(example, encoded, fitted)


class _Documents:
    """The documents of text that a corpus would be made of; all of it is learned, and nothing cut."""

    def __init__(self, recognized: Recognized, tokenizer: Any, report: Report) -> None:
        self.recognized = recognized
        self.encoder = Encoder.of(tokenizer) if tokenizer is not None else None
        self.report = report
        self.splits = self.own_splits = recognized.source.splits if recognized.source else list(recognized.files)
        check_trains(recognized.kwargs["paths"][0], self.splits)

    def items(self, split: str) -> Iterator[Item]:
        """The documents of a split."""
        tally = self.report.tallies[split] = Tally()
        texts = self._texts(split)
        while some := list(itertools.islice(texts, _AT_ONCE)):
            for (text, where), tokens in zip(some, self._tokens([text for text, _ in some]), strict=True):
                encoded = Encoded(tokens, [True] * len(tokens), turns=(0,))
                fitted = Fitted(encoded, turns=1) if text.strip() else Fitted(None, why="empty")
                tally.add(encoded, fitted)
                tally.learned += fitted.sample is not None  # its first token too: another document stands before it
                yield Item([], [text], where, len(tokens), fitted)

    def _texts(self, split: str) -> Iterator[tuple[str, str]]:
        source, key = self.recognized.source, self.recognized.kwargs.get("text_key", "text")
        if source is None:
            for path in self.recognized.files[split]:
                for number, text in enumerate(documents(TextPart(path, "text", 0, -1, "text", 0), self.report.bad)):
                    yield text, f"{path}:[{number}]"
            return
        for record in source.records(split, self.report.bad):
            try:
                yield text_of(record.value.get(key), key, record.where, empty=True), record.where
            except DataError as error:
                self.report.bad(error)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each, with those that a corpus has around it."""
        if self.encoder is None:
            return [[0] * len(text) for text in texts]
        tokens, lengths = self.encoder(texts)
        return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@dataclass(frozen=True)
class _Look:
    """What shows in one record alone."""

    report: Report
    special: re.Pattern[str]
    wants_prompt: bool

    def __call__(self, item: Item) -> None:
        """Note what is to be said."""
        where = str(item.where)
        for text in (*item.asked, *item.learned):
            for kind, pattern in (("control characters", _CONTROL), ("special token spelled out", self.special)):
                found = pattern.search(text)
                if found:
                    self.report.add("warning", kind, where, repr(found[0]))
            if "\ufffd" in text:
                self.report.add("warning", "replacement characters (a wrong encoding)", where)
        asked, learned = "".join(item.asked).strip(), "".join(item.learned).strip()
        if asked and asked == learned:
            self.report.add("warning", "answer repeats the prompt", where)
        elif not asked and self.wants_prompt:
            self.report.add("warning", "empty prompt", where)
        fitted = item.fitted
        if fitted.why.startswith("nothing to learn within"):
            self.report.add("error", "nothing left to learn", where, f"{item.tokens} tokens, the answer is cut off")
        elif fitted.sample is None:
            self.report.add("warning", "left out", where, fitted.why)
        elif fitted.cut:
            excess = item.tokens - len(fitted.sample.tokens)
            self.report.add("warning", f"{fitted.cut} cut", where, f"{item.tokens} tokens, {excess} too many")


class _Seen:
    """Hashes of all records and where they are, 27 bytes each."""

    def __init__(self) -> None:
        self._whole, self._prompt = array("Q"), array("Q")
        self._split, self._style, self._line = array("B"), array("H"), array("Q")
        self._splits: list[str] = []
        self._styles: dict[tuple[str, str, str], int] = {}
        self._odd: dict[int, Any] = {}

    def add(self, split: str, item: Item) -> None:
        """Remember a record."""
        if split not in self._splits:
            self._splits.append(split)
        asked = _hash(item.asked)
        self._whole.append(_hash([*item.asked, None, *item.learned]))
        self._prompt.append(asked if any(text.strip() for text in item.asked) else 0)
        self._split.append(self._splits.index(split))
        match = _PLACE.fullmatch(item.where) if isinstance(item.where, str) else None
        if match is None:
            self._odd[len(self._line)] = item.where
        style = (match[1], match[2], match[4]) if match else ("", "", "")
        self._style.append(self._styles.setdefault(style, len(self._styles)))
        self._line.append(int(match[3]) if match else 0)

    def _where(self, number: int) -> str:
        if number in self._odd:
            return str(self._odd[number])
        name, before, after = list(self._styles)[self._style[number]]
        return f"{name}{before}{self._line[number]}{after}"

    def report(self, report: Report) -> None:
        """Name duplicates within a split, duplicates between splits, and prompts with several answers."""
        whole, prompt = np.frombuffer(self._whole, np.uint64), np.frombuffer(self._prompt, np.uint64)
        repeated = np.zeros(len(whole), np.bool_)
        for first, later in _equal_pairs(whole):
            repeated[later] = True
            same = self._split[first] == self._split[later]
            kind = "duplicate" if same else "in two splits"
            report.add("warning", kind, self._where(later), f"the same record as {self._where(first)}")
        for first, later in _equal_pairs(prompt):
            if prompt[first] and not repeated[later]:
                where = self._where(first)
                report.add("warning", "same prompt, other answer", self._where(later), f"the prompt of {where}")


def _hash(texts: Sequence[str | None]) -> int:
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _equal_pairs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, later) of equal values, in the order of the later."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    again = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    if not len(again):
        return
    group_start = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    firsts = order[group_start[np.searchsorted(group_start, again, side="right") - 1]]
    laters = order[again]
    for number in np.argsort(laters, kind="stable"):
        yield int(firsts[number]), int(laters[number])
