"""Training rows read and tokenized while the run trains, for data sets one does not want on disk a second time.

The stream is a chain of windows, each so many records of the source in a row. Within a window rows are shuffled anew
every epoch, or packed. Where a position of the stream lies follows from how many rows each window gives, so that a
resumed run skips windows without tokenizing them.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace, Sample
from mixtral_recipes.data.batches.fit import Encoded, Tally
from mixtral_recipes.data.batches.packing import Balanced, pack
from mixtral_recipes.data.cache import tokenizer_hash
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import BadRecord, Skipped, stop
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.home import data_home

WINDOW = 4096  # records
WINDOW_CHARACTERS = 16 << 20  # or fewer records, once their texts are so long
VALIDATION_ROWS = 8192
VALIDATION_TOKENS = 1 << 23  # or fewer rows, once they hold so many
_FORMAT = 2  # raise when the same records would give other packs


class InMemory:
    """The samples a streamed data set is validated on: the first of its validation split, as many as are bearable."""

    def __init__(self, pipeline: RecordPipeline, tokenizer: Any) -> None:
        outcomes = pipeline.outcomes("validation", tokenizer, _policy(pipeline), Tally())
        self._samples: list[Sample] = []
        tokens = 0
        for outcome in itertools.islice(outcomes, VALIDATION_ROWS):
            if outcome.fitted.sample is not None:
                self._samples.append(_sample(outcome.fitted.sample))
                tokens += len(outcome.fitted.sample.tokens)
            if tokens > VALIDATION_TOKENS:
                break
        self.lengths = [len(sample["loss_mask"]) for sample in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class Window(NamedTuple):
    """Records in a row.

    Attributes:
        epoch: How often all were read before.
        number: Which window of the epoch it is.
        examples: Its usable records.
    """

    epoch: int
    number: int
    examples: list[Example]


class Rows(Protocol):
    """How a window becomes rows."""

    def count(self, window: Window) -> int:
        """How many rows it gives, the same in every epoch."""
        ...

    def rows(self, window: Window, bad: BadRecord) -> Sequence[Any]:
        """They, in this epoch's order; what `taken` makes samples of."""
        ...

    def taken(self, rows: list[Any], bad: BadRecord) -> list[Any]:
        """The samples, or packs of samples, of the rows that a rank has."""
        ...


@dataclass(frozen=True)
class TrainingStream:
    """The training rows of a data set, in an order that depends on the seed only, on any number of ranks.

    Every rank reads all records.

    Attributes:
        pipeline: The way of the records.
        how: How a window becomes rows.
    """

    pipeline: RecordPipeline
    how: Rows

    def rows(self, start: int, bad: BadRecord) -> Iterator[Any]:
        """Rows without end, epoch after epoch, from position ``start`` of that stream.

        Raises:
            DataError: there are none, or a record cannot be used.
        """
        epoch, passed = 0, 0
        while True:
            before = passed
            for window in self._windows(epoch, bad if not epoch else _policy(self.pipeline)):
                count = self.how.count(window)
                if passed + count > start:
                    yield from self.how.rows(window, bad)[max(start - passed, 0) :]
                passed += count
            if passed == before:
                raise DataError(f"{self.pipeline.source.spec}: no usable record in its train split.")
            whole = max((start - passed) // (passed - before), 0)  # epochs that were seen whole need not be read again
            epoch, passed = epoch + 1 + whole, passed + whole * (passed - before)

    def _windows(self, epoch: int, bad: BadRecord) -> Iterator[Window]:
        number = 0
        held: list[Example] = []
        size = 0
        for example in self.pipeline.examples("train", bad):
            held.append(example)
            size += sum(len(text) for learned in (False, True) for text in example.content.texts(learned=learned))
            if len(held) == WINDOW or size > WINDOW_CHARACTERS:
                yield Window(epoch, number, held)
                number, held, size = number + 1, [], 0
        if held:
            yield Window(epoch, number, held)


@dataclass(frozen=True)
class StreamedBatches(Iterable[Batch]):
    """Endless microbatches of one rank.

    Attributes:
        stream: The rows of all ranks.
        place: This rank's share.
        micro_batch_size: Rows of a microbatch.
        consumed: Rows all ranks have taken before.
        collate: What makes a microbatch of samples.
    """

    stream: TrainingStream
    place: DataParallelPlace
    micro_batch_size: int
    consumed: int
    collate: Callable[[list[Any]], Batch]

    def __iter__(self) -> Iterator[Batch]:
        bad = _policy(self.stream.pipeline, tell=self.place.rank == 0)
        rows = self.stream.rows(self.consumed, bad)
        mine = self.place.share(self.micro_batch_size)
        while True:
            row = list(itertools.islice(rows, self.micro_batch_size * self.place.size))
            yield self.collate(self.stream.how.taken(row[mine], bad))


@dataclass(frozen=True)
class PaddedRows:
    """A row is a record; a rank tokenizes its own.

    A usable record that gives no sample keeps its place as a row in which nothing is learned, so that rows are counted
    without tokenizing.

    Attributes:
        pipeline: The way of the records.
        tokenizer: What tokenizes.
        seed: Seed of the order.
        pad_id: What an empty row is made of.
    """

    pipeline: RecordPipeline
    tokenizer: Any
    seed: int
    pad_id: int

    def count(self, window: Window) -> int:
        """One for each record."""
        return len(window.examples)

    def rows(self, window: Window, bad: BadRecord) -> Sequence[Example]:
        """Its records, shuffled."""
        order = np.random.default_rng([self.seed, window.epoch, window.number]).permutation(len(window.examples))
        return [window.examples[position] for position in order]

    def taken(self, rows: list[Example], bad: BadRecord) -> list[Sample]:
        """A sample of each; an empty one where there is nothing to learn."""
        empty = Encoded([self.pad_id] * 2, [False] * 2)
        return [_sample(encoded or empty) for encoded in _encoded(self.pipeline, self.tokenizer, rows, bad)]


class PackedRows:
    """A row is a pack of samples of one window; every rank tokenizes all of it, since their lengths make the packs.

    How many packs a window gives is kept on disk. Where that is not found, it is tokenized once more.
    """

    def __init__(
        self, pipeline: RecordPipeline, tokenizer: Any, seed: int, capacity: int, multiple: int, global_batch_size: int
    ) -> None:
        """Pack what is streamed.

        Args:
            pipeline: The way of the records.
            tokenizer: What tokenizes.
            seed: Seed of the order.
            capacity: Tokens of a pack.
            multiple: What each sample is rounded up to.
            global_batch_size: Packs of a step, whose costs are balanced.
        """
        self.pipeline = pipeline
        self.tokenizer = tokenizer
        self.seed = seed
        self.capacity = capacity
        self.multiple = multiple
        self.global_batch_size = global_batch_size
        self._counts = _Counts(self._kept_in())
        self._last: tuple[int, list[list[Sample]]] = (-1, [])

    def count(self, window: Window) -> int:
        """As found on disk, or by packing it."""
        known = self._counts.get(window.number)
        return known if known is not None else len(self._packed(window, _policy(self.pipeline)))

    def rows(self, window: Window, bad: BadRecord) -> Sequence[list[Sample]]:
        """Its packs, so ordered that neighbours cost about the same."""
        packs = self._packed(window, bad)
        costs = np.array([sum(len(sample["loss_mask"]) ** 2 for sample in one) for one in packs])
        order = Balanced(costs, self.global_batch_size, self.seed + 7919 * window.number)(window.epoch)
        return [packs[number] for number in order]

    def taken(self, rows: list[list[Sample]], bad: BadRecord) -> list[list[Sample]]:
        """They as they are."""
        return rows

    def _packed(self, window: Window, bad: BadRecord) -> list[list[Sample]]:
        number, packed = self._last
        if number != window.number:
            encoded = _encoded(self.pipeline, self.tokenizer, window.examples, bad)
            samples = [_sample(one) for one in encoded if one is not None]
            lengths = np.array([len(sample["loss_mask"]) for sample in samples], np.int64)
            packs = pack(-(-lengths // self.multiple) * self.multiple, self.capacity)
            packed = [[samples[n] for n in packs.members(one)] for one in range(len(packs))]
            self._last = (window.number, packed)
            self._counts.put(window.number, len(packed))
        return packed

    def _kept_in(self) -> Path | None:
        """The file for the counts; None for a source that does not say what it holds."""
        identity = self.pipeline.source.identity()
        if None in identity.values():
            return None
        about = [
            *(_FORMAT, WINDOW, WINDOW_CHARACTERS, self.capacity, self.multiple, self.pipeline.fit.seq_length),
            tokenizer_hash(self.tokenizer),
            self.pipeline.identity(self.tokenizer),
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        return data_home() / "streams" / f"{digest[:20]}.packs"


class _Counts:
    """Packs of each window, plus one, as 32-bit numbers at its place in a file; 0 where it is not known.

    Several processes may write: all write the same.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        there = file is not None and file.is_file()
        self._known = np.fromfile(str(file), "<u4").tolist() if there else []

    def get(self, window: int) -> int | None:
        return self._known[window] - 1 if window < len(self._known) and self._known[window] else None

    def put(self, window: int, count: int) -> None:
        if self.get(window) == count:
            return
        self._known += [0] * (window + 1 - len(self._known))
        self._known[window] = count + 1
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            place = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(place, (count + 1).to_bytes(4, "little"), 4 * window)
            finally:
                os.close(place)


class _Told(Skipped):
    """Records that are left out of a stream: the first is named, and all are counted."""

    def __call__(self, error: DataError, record: Any = None) -> None:
        """Leave one out."""
        super().__call__(error, record)
        if self.count == 1:
            print(f"data: left out, with others like it (data check names all): {error}", file=sys.stderr, flush=True)


def _policy(pipeline: RecordPipeline, *, tell: bool = False) -> BadRecord:
    return stop if pipeline.on_bad_record == "stop" else _Told() if tell else Skipped()


def _encoded(
    pipeline: RecordPipeline, tokenizer: Any, examples: list[Example], bad: BadRecord
) -> Iterator[Encoded | None]:
    """The sample of each example; None where there is nothing to learn, or it cannot be tokenized."""
    encoder = pipeline.encoder(tokenizer)
    pairs = [(example.content, example.where) for example in examples]
    for example, encoded in zip(examples, encoder.encode_some(pairs), strict=True):
        if isinstance(encoded, DataError):
            bad(encoded, example.value)
            yield None
        else:
            yield None if example.content.left_out else pipeline.fit(encoded, example.where).sample


def _sample(encoded: Encoded) -> Sample:
    return Sample(tokens=np.array(encoded.tokens, np.int32), loss_mask=np.array(encoded.learned[1:], np.bool_))
