"""Checks a data set before it is trained on: every record once, in bounded memory.

An *error* is a record that would stop a run (or be left out); a *warning* is one that would train, perhaps not as
meant.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_recipes.data.batches.samples import Encoded
from mixtral_recipes.data.recognise import Recognized
from mixtral_recipes.data.records.conversations import conversation
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.data.records.pairs import Pair, PairEncoder, PairTemplate, text_of
from mixtral_recipes.data.records.record import Record
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
        records: Records per split.
        counts: Findings per (level, kind).
        findings: The first `KEPT_PER_KIND` of each kind.
        lengths: Tokens per sample (characters, without a tokenizer) per split.
        learned: Label tokens of all samples.
        unit: ``tokens`` or ``characters``.
    """

    records: dict[str, int] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    learned: int = 0
    unit: str = "tokens"

    def add(self, level: str, kind: str, where: str, detail: str = "") -> None:
        """Note a finding."""
        self.counts[level, kind] += 1
        if self.counts[level, kind] <= KEPT_PER_KIND:
            self.findings.append(Finding(level, kind, where, detail))

    @property
    def errors(self) -> int:
        """Records that would stop a run."""
        return sum(count for (level, _), count in self.counts.items() if level == "error")


class Item(NamedTuple):
    """A usable record: what distinguishes it from others, and what is tokenized."""

    prompt: str
    answer: str
    where: Any
    content: Any


def check(
    recognized: Recognized,
    tokenizer: Any = None,
    *,
    seq_length: int = 2048,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Check every record of a data set.

    Args:
        recognized: The data set, as `recognize` found it.
        tokenizer: Measures lengths in tokens; None measures characters.
        seq_length: Positions a sample may take.
        progress: Called with the number of records looked at since the last call.
    """
    report = Report(unit="tokens" if tokenizer is not None else "characters")
    reader = _Reader(recognized, tokenizer, report)
    seen = _Seen()
    for split in reader.splits:
        report.records[split] = 0
        sizes = array("i")
        for items in _batches(reader.items(split)):
            report.records[split] += len(items)
            for item in items:
                reader.look(item)
                seen.add(split, item)
            for item, encoded in zip(items, reader.encode(items), strict=True):
                sizes.append(len(encoded.tokens))
                _look_at_length(report, item, encoded, seq_length, reader.keep_end)
            progress(len(items))
        report.lengths[split] = np.frombuffer(sizes, np.int32) if len(sizes) else np.empty(0, np.int32)
        if not report.records[split]:
            report.add("error", "no usable record", f"{split} split")
    seen.report(report)
    return report


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class _Reader:
    """Reads, normalises and tokenizes the records of one kind of data set."""

    def __init__(self, recognized: Recognized, tokenizer: Any, report: Report) -> None:
        if recognized.kind == "corpus":
            raise DataError("an indexed corpus holds tokens already; check the text it was prepared from.")
        self.recognized = recognized
        self.report = report
        self.keep_end = recognized.kind != "chat"
        self.tokenizer = tokenizer
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special] if tokenizer else ["</s>"]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._names: frozenset[str] | None = None
        if recognized.kind == "chat":
            from mixtral_recipes.data.modules.chat import ChatEncoder

            self._chat = ChatEncoder(tokenizer) if tokenizer else None
        self._pairs = PairEncoder(tokenizer) if tokenizer else None

    @property
    def splits(self) -> list[str]:
        return self.recognized.source.splits if self.recognized.source else ["train"]

    def bad(self, error: DataError, record: Any = None) -> None:
        """Note a record that cannot be used; its message begins with its place."""
        text = str(error).rstrip(".")
        match = _PLACE.match(text)
        where = match[0] if match else text
        self.report.add("error", "unusable", where, text[len(where) :].lstrip(": "))

    def items(self, split: str) -> Iterator[Item]:
        """The usable records of a split."""
        kind = self.recognized.kind
        if kind == "squad":
            yield from self._squad(split)
            return
        if kind == "text" and self.recognized.source is None:
            path = Path(self.recognized.kwargs["paths"][0])
            for number, text in enumerate(documents(TextPart(path, "text", 0, -1, "text", 0))):
                yield Item("", text, f"{path}:[{number}]", text)
            return
        assert self.recognized.source is not None
        template = PairTemplate(columns=self.recognized.kwargs.get("columns") or {})
        for record in self.recognized.source.records(split, self.bad):
            self._same_fields(record)
            try:
                if kind == "chat":
                    messages = conversation(record)
                    learned = "\x1e".join(m["content"] for m in messages if m["role"] == "assistant")
                    asked = "\x1e".join(m["content"] for m in messages if m["role"] != "assistant")
                    yield Item(asked, learned, record.where, messages)
                elif kind == "pairs":
                    pair = template.pair(record)
                    yield Item(pair.prompt, pair.answer, record.where, pair)
                else:
                    text = text_of(record.value.get("text"), "text", record.where)
                    yield Item("", text, record.where, text)
            except DataError as error:
                self.bad(error)

    def _squad(self, split: str) -> Iterator[Item]:
        from mixtral_recipes.data.modules.squad import located_questions

        source = self.recognized.source or open_source("rajpurkar/squad")
        for question, where in located_questions(source, split, self.bad):
            pair = Pair(question.prompt(), " " + question.answers[0])
            yield Item(pair.prompt, pair.answer, where, pair)

    def _same_fields(self, record: Record) -> None:
        names = frozenset(record.value)
        if self._names is None:
            self._names = names
        elif not self._names <= names:
            missing = ", ".join(sorted(self._names - names))
            self.report.add("warning", "other fields than the first record", record.where, f"lacks {missing}")

    def look(self, item: Item) -> None:
        """Check what shows in the text alone."""
        text = f"{item.prompt}\n{item.answer}"
        for kind, pattern in (("control characters", _CONTROL), ("special token spelled out", self._special)):
            found = pattern.search(text)
            if found:
                self.report.add("warning", kind, str(item.where), repr(found[0]))
        if "\ufffd" in text:
            self.report.add("warning", "replacement characters (a wrong encoding)", str(item.where))
        if item.prompt and item.prompt.strip() == item.answer.strip():
            self.report.add("warning", "answer repeats the prompt", str(item.where))
        elif not item.prompt.strip() and self.recognized.kind == "pairs":
            self.report.add("warning", "empty prompt", str(item.where))

    def encode(self, items: list[Item]) -> Iterator[Encoded]:
        """Token counts and label masks; without a tokenizer, characters are counted instead of tokens."""
        if self.tokenizer is None:
            for item in items:
                size = len(item.prompt) + len(item.answer)
                yield Encoded([0] * size, [False] * len(item.prompt) + [True] * len(item.answer))
        elif self.recognized.kind == "chat":
            assert self._chat is not None
            for item in items:
                try:
                    yield self._chat.encode(item.content, str(item.where))
                except DataError as error:
                    self.bad(error)
                    yield Encoded([], [])
        elif self.recognized.kind == "text":
            ids = self.tokenizer([item.content for item in items], add_special_tokens=False)["input_ids"]
            yield from (Encoded(row, [True] * len(row)) for row in ids)
        else:
            assert self._pairs is not None
            yield from self._pairs(item.content for item in items)


def _look_at_length(report: Report, item: Item, encoded: Encoded, seq_length: int, keep_end: bool) -> None:
    excess = len(encoded.tokens) - (seq_length + 1)
    report.learned += sum(encoded.learned)
    if excess <= 0 or report.unit == "characters":
        return
    kept = encoded.learned[1 + excess :] if keep_end else encoded.learned[1:-excess]
    if not any(kept):
        report.add(
            "error", "nothing left to learn", str(item.where), f"{len(encoded.tokens)} tokens, the answer is cut off"
        )
    elif sum(kept) < sum(encoded.learned):
        report.add("warning", "answer cut", str(item.where), f"{len(encoded.tokens)} tokens, {excess} too many")
    else:
        report.add("warning", "prompt cut", str(item.where), f"{len(encoded.tokens)} tokens, {excess} too many")


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
        self._whole.append(_hash(item.prompt + "\x1f" + item.answer))
        self._prompt.append(_hash(item.prompt) if item.prompt.strip() else 0)
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


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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
