"""From records to samples, step by step: read, held out, tokenized, cut, counted.

A run, `data check`, `data show` and streaming all take this one way, so that they see the same.
"""

import functools
import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mixtral_recipes.data.batches.fit import Encoded, Fit, Fitted, Tally
from mixtral_recipes.data.batches.samples import SampleStore, tokenized_splits
from mixtral_recipes.data.cache import tokenizer_hash
from mixtral_recipes.data.records.bad_records import BadRecord, Skipped, check_policy, passed_over, stop
from mixtral_recipes.data.records.conversations import Conversation
from mixtral_recipes.data.records.open import Source
from mixtral_recipes.data.records.pairs import Pair
from mixtral_recipes.data.records.record import SPLITS, Record
from mixtral_recipes.errors import DataError, some_of
from mixtral_recipes.system.ranks import launched_rank

_AT_ONCE = 256
SKIPPED_FILE = "skipped.jsonl"


class Example(NamedTuple):
    """A usable record.

    Attributes:
        content: What is tokenized.
        where: Its place.
        value: As it was read.
        passage: What must not be in two splits together with another example's; None where each stands alone.
    """

    content: Pair | Conversation
    where: object
    value: Any
    passage: str | None = None


class Encoder(Protocol):
    """Tokenizes examples."""

    def encode_some(self, some: Sequence[tuple[Any, object]], /) -> Iterable[Encoded | DataError]:
        """Tokens of contents with their places; an error where one cannot be tokenized."""
        ...

    def settings(self) -> Any:
        """What the tokens depend on besides the tokenizer."""


class Outcome(NamedTuple):
    """What became of an example."""

    example: Example
    encoded: Encoded
    fitted: Fitted


@dataclass(frozen=True)
class RecordPipeline:
    """The way of a data set's records to samples.

    Attributes:
        source: Where they are.
        read: The examples of a record, usually one; it raises for a record of which none can be used.
        encoder: Given a tokenizer, what tokenizes them.
        fit: How they are cut.
        made_from: What the examples depend on besides the source.
        val_proportion: Share held out for validation where there is no such split.
        on_bad_record: ``stop`` or ``skip``.
    """

    source: Source
    read: Callable[[Record, BadRecord], Iterator[Example]]
    encoder: Callable[[Any], Encoder]
    fit: Fit
    made_from: dict[str, Any]
    val_proportion: float
    on_bad_record: str

    def __post_init__(self) -> None:
        check_policy(self.on_bad_record)
        if not 0 <= self.val_proportion < 1:
            raise DataError(
                f"data.val_proportion={self.val_proportion} must be a share of the records: at least 0 and less than 1."
            )

    @functools.cached_property
    def splits(self) -> list[str]:
        """Names of the splits, with the one that is held out."""
        own = self.source.splits
        return [*own, "validation"] if "validation" not in own and self._holds_out else own

    def policy(self, skipped: Skipped | None = None) -> BadRecord:
        """What happens to a record that cannot be used; if the run continues, ``skipped`` records it."""
        return stop if self.on_bad_record == "stop" else skipped or Skipped()

    def check(self) -> None:
        """Read every record without tokenizing it.

        What only a chat template refuses (an order of roles) shows when it is applied.

        Raises:
            DataError: the first that cannot be used, that a split has none, or that nothing of training is learned.
        """
        for split in self.source.splits:
            bad = self.policy()
            reasons = Counter(example.content.left_out for example in self._of_source(split, bad))
            if not reasons:
                first = f": {bad.first}" if isinstance(bad, Skipped) and bad.first else "."
                raise DataError(f"{self.source.spec}: no usable record in its {split} split{first}")
            if split == "train" and "" not in reasons:
                raise DataError(f"{self.source.spec}: no training samples ({_told(reasons)}).")

    def examples(self, split: str, bad: BadRecord = stop) -> Iterator[Example]:
        """The examples of a split; those that are held out are in ``validation`` and not in ``train``."""
        if split in self.source.splits and (split != "train" or not self._holds_out):
            yield from self._of_source(split, bad)
            return
        wanted = split == "validation"
        # A bad record is reported once, by the training split.
        for number, example in enumerate(self._of_source("train", passed_over if wanted else bad)):
            if self._is_held_out(number, example) == wanted:
                yield example

    def outcomes(self, split: str, tokenizer: Any, bad: BadRecord, tally: Tally) -> Iterator[Outcome]:
        """What becomes of each example of a split, counted in the tally."""
        encoder = self.encoder(tokenizer)
        examples = self.examples(split, bad)
        while some := list(itertools.islice(examples, _AT_ONCE)):
            encoded = encoder.encode_some([(example.content, example.where) for example in some])
            for example, result in zip(some, encoded, strict=True):
                if isinstance(result, DataError):
                    bad(result, example.value)
                    continue
                why = example.content.left_out
                fitted = Fitted(None, why=why) if why else self.fit(result, example.where)
                tally.add(result, fitted)
                count_fields(example, tally)
                yield Outcome(example, result, fitted)

    def stores(self, tokenizer: Any) -> dict[str, SampleStore]:
        """The samples of all splits on disk, tokenized in the first process that asks.

        Raises:
            DataError: no training sample, or a record that cannot be used.
        """
        key = {
            **self.identity(tokenizer),
            "tokenizer": tokenizer_hash(tokenizer),
            "seq_length": self.fit.seq_length,
        }
        stores = tokenized_splits(key, lambda folder: self._samples(folder, tokenizer), vocab_size=len(tokenizer))
        stores = {name: stores[name] for name in SPLITS if name in stores}
        self._tell(stores)
        if "train" in stores and not len(stores["train"]):
            raise DataError(f"{self.source.spec}: no training samples ({_told(stores['train'].tally.dropped)}).")
        return {name: store for name, store in stores.items() if len(store)}

    def identity(self, tokenizer: Any) -> dict[str, Any]:
        """What the samples depend on besides the tokenizer and the length."""
        return {
            **self.made_from,
            "source": self.source.identity(),
            "encoder": self.encoder(tokenizer).settings(),
            "fit": [self.fit.truncation, self.fit.prompt_floor],
            "val_proportion": self.val_proportion,
            "on_bad_record": self.on_bad_record,
        }

    def tell_what_is_not_read(self) -> None:
        """Name what the source has beside its splits."""
        if launched_rank() == 0 and self.source.unread:
            unread = some_of(self.source.unread, 3)
            print(f"data: not read, because they are in no split of {self.source.spec}: {unread}", file=sys.stderr)

    def _samples(self, folder: Path, tokenizer: Any) -> dict[str, tuple[Iterator[Encoded], Tally]]:
        def samples(split: str, tally: Tally) -> Iterator[Encoded]:
            bad = self.policy(Skipped(folder / SKIPPED_FILE))
            for outcome in self.outcomes(split, tokenizer, bad, tally):
                if outcome.fitted.sample is not None:
                    yield outcome.fitted.sample
            tally.skipped = bad.count if isinstance(bad, Skipped) else 0

        tallies = {split: Tally() for split in self.splits}
        return {split: (samples(split, tally), tally) for split, tally in tallies.items()}

    def _tell(self, stores: dict[str, SampleStore]) -> None:
        if launched_rank():
            return
        for name, store in stores.items():
            tally = store.tally
            told = list(tally.sentences(self.fit.seq_length))
            if tally.skipped:
                file = store.folder.parent / SKIPPED_FILE
                told.append(f"{tally.skipped:,} record(s) skipped, see {file}")
            print(f"data: {name}: {'; '.join(told)}", file=sys.stderr)

    def _of_source(self, split: str, bad: BadRecord) -> Iterator[Example]:
        for record in self.source.records(split, bad):
            try:
                yield from self.read(record, bad)
            except DataError as error:
                bad(error, record.value)

    @functools.cached_property
    def _holds_out(self) -> bool:
        if "validation" in self.source.splits or not self.val_proportion:
            return False
        return self.source.streaming or bool(self._held_out)

    def _is_held_out(self, number: int, example: Example) -> bool:
        """Whether an example is in the validation split that is held out; of a stream without reading what follows."""
        if not self.source.streaming:
            return (number if example.passage is None else _hash(example.passage)) in self._held_out
        share = round(self.val_proportion * 10_000)
        place = (number - 1) * share if example.passage is None else _hash(example.passage)  # the second is held out
        return place % 10_000 < share

    @functools.cached_property
    def _held_out(self) -> "range | set[int]":
        """Numbers, or hashes of passages, of the examples at the end that are held out; at least one of two."""
        count = 0
        passages: dict[int, None] = {}
        for example in self._of_source("train", self.policy()):
            count += 1
            if example.passage is not None:
                passages[_hash(example.passage)] = None
        if passages:
            return set(list(passages)[len(passages) - self._share(len(passages)) :])
        return range(count - self._share(count), count)

    def _share(self, count: int) -> int:
        return min(max(1, round(count * self.val_proportion)), count - 1) if count > 1 else 0


def _told(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,}: {why}" for why, count in reasons.items()) or "no records"


def count_fields(example: Example, tally: Tally) -> None:
    """Count what nothing was read from, and answers that are left alone."""
    tally.unused.update(example.content.unused)
    if isinstance(example.content, Conversation):
        tally.left_alone.update(example.content.left_alone)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
