"""How a window of a stream becomes training rows: a padded row for each record, or packs."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.batches.fit import Encoded
from mixtral_recipes.data.batches.packing import Balanced, pack
from mixtral_recipes.data.cache import code_version, tokenizer_hash
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.modules.streaming import WINDOW, WINDOW_CHARACTERS, Window, sample_of
from mixtral_recipes.data.records.bad_records import BadRecord
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.home import data_home


@dataclass(frozen=True)
class PaddedRows:
    """A row is a record; a rank tokenizes its own.

    A usable record that gives no sample keeps its place as a row in which nothing is learned, so that rows are counted
    without tokenizing.

    Attributes:
        pipeline: The way of the records.
        tokenizer: What tokenizes.
        seed: Seed for the order of the samples.
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
        return [sample_of(encoded or empty) for encoded in _encoded(self.pipeline, self.tokenizer, rows, bad)]


@dataclass
class PackedRows:
    """A row is a pack of samples of one window; every rank tokenizes all of it, since their lengths make the packs.

    How many packs a window gives is kept on disk. Where that is not found, it is tokenized once more.

    Attributes:
        pipeline: The way of the records.
        tokenizer: What tokenizes.
        seed: Seed for the order of the samples.
        capacity: Tokens of a pack.
        multiple: What each sample is rounded up to.
        global_batch_size: Packs of a step, whose costs are balanced.
    """

    pipeline: RecordPipeline
    tokenizer: Any
    seed: int
    capacity: int
    multiple: int
    global_batch_size: int

    def __post_init__(self) -> None:
        self._counts = _Counts(self._kept_in())
        self._last: tuple[int, list[list[Sample]]] = (-1, [])

    def count(self, window: Window) -> int:
        """As found on disk, or by packing it."""
        known = self._counts.get(window.number)
        return known if known is not None else len(self._packed(window, self.pipeline.policy()))

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
            samples = [sample_of(one) for one in encoded if one is not None]
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
            *(code_version(), WINDOW, WINDOW_CHARACTERS, self.capacity, self.multiple, self.pipeline.fit.seq_length),
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
