"""Training rows read and tokenized while the run trains, for data sets one does not want on disk a second time.

The stream is a chain of windows, each so many records of the source in a row. Within a window rows are shuffled anew
every epoch, or packed. Where a position of the stream lies follows from how many rows each window gives, so that a
resumed run skips windows without tokenizing them.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace, Sample
from mixtral_recipes.data.batches.fit import Encoded, Tally
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import BadRecord, Skipped
from mixtral_recipes.errors import DataError

WINDOW = 4096  # records
WINDOW_CHARACTERS = 16 << 20  # or fewer records, once their texts are so long
VALIDATION_ROWS = 8192
VALIDATION_TOKENS = 1 << 23  # or fewer rows, once they hold so many


class InMemory:
    """The samples a streamed data set is validated on: the first of its validation split, as many as are bearable."""

    def __init__(self, pipeline: RecordPipeline, tokenizer: Any) -> None:
        outcomes = pipeline.outcomes("validation", tokenizer, pipeline.policy(), Tally())
        self._samples: list[Sample] = []
        tokens = 0
        for outcome in itertools.islice(outcomes, VALIDATION_ROWS):
            if outcome.fitted.sample is not None:
                self._samples.append(sample_of(outcome.fitted.sample))
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
            for window in self._windows(epoch, bad if not epoch else self.pipeline.policy()):
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
        bad = self.stream.pipeline.policy(None if self.place.rank else _Told())
        rows = self.stream.rows(self.consumed, bad)
        for mine in self.place.microbatches(rows, self.micro_batch_size):
            yield self.collate(self.stream.how.taken(mine, bad))


class _Told(Skipped):
    """Records that are left out of a stream: the first is named, and all are counted."""

    def __call__(self, error: DataError, record: Any = None) -> None:
        """Leave one out."""
        super().__call__(error, record)
        if self.count == 1:
            print(
                f"data: left out, as are any others like it (data check lists all): {error}",
                file=sys.stderr,
                flush=True,
            )


def sample_of(encoded: Encoded) -> Sample:
    """As a loader gives it."""
    return Sample(tokens=np.array(encoded.tokens, np.int32), loss_mask=np.array(encoded.learned[1:], np.bool_))
