"""Training samples read and tokenized while the run trains, for data sets one does not want on disk a second time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace, Sample
from mixtral_recipes.data.batches.fit import Encoded, Tally
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import Skipped, stop
from mixtral_recipes.errors import DataError

WINDOW = 4096
VALIDATION_ROWS = 8192


class InMemory(Dataset[Sample]):
    """The samples a streamed data set is validated on, the first `VALIDATION_ROWS` of its validation split."""

    def __init__(self, pipeline: RecordPipeline, tokenizer: Any) -> None:
        bad = stop if pipeline.on_bad_record == "stop" else Skipped()
        outcomes = pipeline.outcomes("validation", tokenizer, bad, Tally())
        samples = (outcome.fitted.sample for outcome in itertools.islice(outcomes, VALIDATION_ROWS))
        self._samples = [_sample(sample) for sample in samples if sample is not None]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


@dataclass(frozen=True)
class TrainingStream:
    """The training samples of a data set in an order that depends on the seed only.

    Records are shuffled within windows of `WINDOW`. Every rank reads all records and tokenizes its own. A usable record
    that gives no sample keeps its place as a row in which nothing is learned, so that a position in the stream can be
    found without tokenizing what is before it.

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

    def batches(
        self,
        place: DataParallelPlace,
        micro_batch_size: int,
        consumed: int,
        collate: Callable[[list[Sample]], Batch],
        *,
        num_workers: int,
    ) -> Iterator[Batch]:
        """Endless microbatches of a rank, from a position of the stream on; a worker process reads ahead if allowed."""
        made = _Batches(self, place, micro_batch_size, consumed, collate)
        own = torch.Generator().manual_seed(0)  # as for samples on disk
        return iter(DataLoader(made, batch_size=None, num_workers=min(num_workers, 1), generator=own))

    def examples(self, start: int) -> Iterator[Example]:
        """Examples without end, epoch after epoch, from position ``start`` of that stream.

        Raises:
            DataError: there are none, or one cannot be used.
        """
        epoch, passed = 0, 0
        while True:
            count = 0
            stream = self.pipeline.examples("train", stop if self.pipeline.on_bad_record == "stop" else Skipped())
            for number in itertools.count():
                window = list(itertools.islice(stream, WINDOW))
                if not window:
                    break
                count += len(window)
                if passed + len(window) <= start:
                    passed += len(window)
                    continue
                order = np.random.default_rng([self.seed, epoch, number]).permutation(len(window))
                for position in order[max(start - passed, 0) :]:
                    yield window[position]
                passed += len(window)
            if not count:
                raise DataError(f"{self.pipeline.source.spec}: no usable record in its train split.")
            whole = max((start - passed) // count, 0)  # epochs that were seen whole need not be read again
            epoch, passed = epoch + 1 + whole, passed + whole * count

    def samples(self, examples: list[Example]) -> list[Sample]:
        """A sample of each example; an empty one where there is nothing to learn."""
        encoder = self.pipeline.encoder(self.tokenizer)
        made: list[Sample] = []
        pairs = [(example.content, example.where) for example in examples]
        for example, encoded in zip(examples, encoder.encode_some(pairs), strict=True):
            if isinstance(encoded, DataError):
                if self.pipeline.on_bad_record == "stop":
                    raise encoded
                encoded = Encoded([], [])
            why = example.content.left_out or not encoded.tokens
            fitted = None if why else self.pipeline.fit(encoded, example.where).sample
            made.append(_sample(fitted or Encoded([self.pad_id] * 2, [False] * 2)))
        return made


class _Batches(IterableDataset[Batch]):
    def __init__(
        self,
        stream: TrainingStream,
        place: DataParallelPlace,
        micro_batch_size: int,
        consumed: int,
        collate: Callable[[list[Sample]], Batch],
    ) -> None:
        self.stream = stream
        self.place = place
        self.micro_batch_size = micro_batch_size
        self.consumed = consumed
        self.collate = collate

    def __iter__(self) -> Iterator[Batch]:
        examples = self.stream.examples(self.consumed)
        mine = self.place.share(self.micro_batch_size)
        while True:
            row = list(itertools.islice(examples, self.micro_batch_size * self.place.size))
            yield self.collate(self.stream.samples(row[mine]))


def _sample(encoded: Encoded) -> Sample:
    return Sample(tokens=np.array(encoded.tokens, np.int32), loss_mask=np.array(encoded.learned[1:], np.bool_))
