"""What all data modules share: datasets made once a tokenizer is known, and microbatches for one rank."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mixtral_recipes.data.batches.batch import (
    Batch,
    DataParallelPlace,
    EpochOrder,
    PadCollate,
    Samples,
    Shuffled,
    WithBlanks,
    in_turn,
    sample_stream,
)
from mixtral_recipes.data.batches.packing import Balanced, PackCollate, PackedDataset
from mixtral_recipes.data.batches.samples import content_of
from mixtral_recipes.data.modules.pipeline import RecordPipeline
from mixtral_recipes.data.modules.streamed_rows import PackedRows, PaddedRows
from mixtral_recipes.data.modules.streaming import InMemory, StreamedBatches, TrainingStream
from mixtral_recipes.data.records.open import Source, check_trains, open_source
from mixtral_recipes.data.records.record import SPLITS
from mixtral_recipes.errors import DataError
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.system.ranks import launched_local_rank, shared


@dataclass
class DataModule:
    """Base of the data modules; subclasses implement `pipeline` or `datasets`.

    Attributes:
        seq_length: Maximum number of tokens in a sequence.
        micro_batch_size: Rows (sequences, or packs) per forward pass of one data-parallel rank; 1 for packs.
        global_batch_size: Rows per optimizer step.
        num_workers: Loader processes per rank; 0 loads in the training process.
        seed: Seed for the order of the samples.
        packed_sequence_specs: How samples are packed; None pads instead.
    """

    seq_length: int = 2048
    micro_batch_size: int = 1
    global_batch_size: int = 8
    num_workers: int = 0
    seed: int = 1234
    packed_sequence_specs: PackedSequenceSpecs | None = None

    # Whether every microbatch has row_length tokens, or only as many as its longest sample.
    fixed_length = True
    # Whether samples can share a sequence; a module whose sequences are full does not ask.
    packs: ClassVar[bool] = True
    # Whether each training epoch has an order of its own.
    shuffles = True
    # Whether records are read while training: a setting of the modules that read records.
    streaming = False
    # What the records are, in a word.
    form = "unknown"
    # Whether it is read for a model that was not trained on it (`Source.to_judge_on`).
    judges = False
    # What the samples depend on besides the tokenizer and the length: content of files, template, columns.
    made_from: Mapping[str, Any] | None = None

    @property
    def sources_set_up(self) -> "Sequence[DataModule]":
        """Its sources, once `setup` has run: itself where there is one."""
        return [self]

    @property
    def source_names(self) -> list[str]:
        """The sources whose losses are told apart; none where there is one."""
        return []

    def opened(self, spec: str | Path | None) -> Source:
        """The splits of what a module of records reads."""
        source = open_source(spec, streaming=self.streaming)
        if self.judges:
            return source.to_judge_on()
        check_trains(spec, source.splits)
        return source

    def pipelines(self) -> list[RecordPipeline]:
        """The record pipeline of each of its sources."""
        pipeline = self.pipeline()
        return [pipeline] if pipeline is not None else []

    def pipeline(self) -> RecordPipeline | None:
        """The pipeline from its records to samples; None for a module without records."""
        return None

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """Make the sets of samples: ``train`` and, where they exist, ``validation`` and ``test``.

        Args:
            tokenizer: A transformers tokenizer, or None for data that needs none.

        Returns:
            Split -> data set with ``len()`` and samples by position, each a dict with ``tokens`` (n + 1 whole numbers)
            and ``loss_mask`` (n numbers, 1 where the next token is learned). Where samples are packed it has
            ``lengths``, the n of each.

        Raises:
            DataError: there is no tokenizer, or a record cannot be used.
        """
        pipeline = self._identified(tokenizer)
        stores = pipeline.stores(tokenizer)
        # What became of the records too: another release may read them otherwise.
        self.made_from = {**pipeline.identity(tokenizer), "samples": content_of(stores)}
        return dict(stores)

    def _identified(self, tokenizer: Any) -> RecordPipeline:
        """The record pipeline, after noting what the records are."""
        pipeline = self.pipeline()
        if pipeline is None:
            raise TypeError(f"{type(self).__name__} must define pipeline() or datasets()")
        if tokenizer is None:
            name = type(self).__name__
            raise DataError(f"{name} needs a tokenizer; the checkpoint has none in its context folder.")
        pipeline.tell_what_is_not_read()
        self.made_from = pipeline.identity(tokenizer)
        return pipeline

    def identity(self) -> dict[str, Any]:
        """What the data set is, by content, once `setup` has read it: its recognised ``form`` and ``sha256``."""
        if self.made_from is None:
            return {"form": self.form}
        text = json.dumps(self.made_from, sort_keys=True, default=str)
        return {"form": self.form, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def places(self) -> list[str]:
        """What its files, folders or data sets of the Hub are named; empty for a module that says nothing of it."""
        root = getattr(self, "dataset_root", None)
        return [str(root)] if root else []

    def tokenizer_for(self, tokenizer: Any, *, grow: bool) -> Any:
        """The tokenizer of a run on this data: the model's, with what the data changes of it.

        Args:
            tokenizer: The model's, or the one that was named.
            grow: Whether tokens may be added, for which the model grows (``resume.restore_config.resize_vocab``).
        """
        return tokenizer

    @property
    def train_path(self) -> Path:
        """NeMo's name for the file of the training split in a folder ``dataset_root``."""
        return self._path("training")

    @property
    def validation_path(self) -> Path:
        """Likewise of the validation split."""
        return self._path("validation")

    @property
    def test_path(self) -> Path:
        """Likewise of the test split."""
        return self._path("test")

    def _path(self, split: str) -> Path:
        return Path(getattr(self, "dataset_root", None) or ".").expanduser() / f"{split}.jsonl"

    def prepare_data(self) -> None:
        """Hook for subclasses that download or write files; called once per machine, before files are looked for."""

    @property
    def prepares(self) -> bool:
        """Whether a subclass makes its files itself, so that they need not be there yet."""
        return type(self).prepare_data is not DataModule.prepare_data

    def check_places(self) -> None:
        """Check that the files exist, without reading them or asking the Hub.

        Raises:
            DataError: names what is missing.
        """

    @property
    def pack_size(self) -> int | None:
        """Tokens per pack; None when samples are padded."""
        shape = BatchShape.of(self)
        return shape.seq_length if shape.packed else None

    @property
    def row_length(self) -> int:
        """Tokens of a full row of a microbatch: ``seq_length``, or the size of a pack."""
        return BatchShape.of(self).seq_length

    @property
    def sample_length(self) -> int:
        """Most tokens of one sample: ``seq_length``, and no more than a pack holds."""
        return min(self.seq_length, self.row_length)

    def setup(self, tokenizer: Any) -> None:
        """Make the datasets; called once on every rank before batches are asked for."""
        if self.prepares:
            shared(lambda: self.prepare_data() if launched_local_rank() == 0 else None)
        self._pad_id = _pad_id(tokenizer)
        self._packed: dict[tuple[str, int], PackedDataset] = {}
        if self.streaming:
            self._sets: dict[str, Samples] = self._stream_sets(tokenizer)
            return
        sets: Any = self.datasets(tokenizer)
        if isinstance(sets, tuple):
            sets = {name: part for name, part in zip(("train", "validation"), sets, strict=True) if part is not None}
        self._check_sets(sets)
        self._sets = sets

    def _stream_sets(self, tokenizer: Any) -> dict[str, Samples]:
        """Keep what the training stream is made with, and make the validation set, which is held in memory.

        Raises:
            DataError: every microbatch is to have as many borders as the fullest pack, which a stream does not know.
        """
        if self.packed_sequence_specs is not None and self.packed_sequence_specs.pad_cu_seqlens:
            raise DataError(
                "data.streaming=true cannot be combined with pad_cu_seqlens, which first counts the samples of every "
                "pack; set data.packed_sequence_specs.pad_cu_seqlens=false, or leave streaming out (prepared samples "
                "stay on disk, too)."
            )
        pipeline = self._identified(tokenizer)
        self._streamed = (pipeline, tokenizer)
        held = InMemory(pipeline, tokenizer) if "validation" in pipeline.splits else ()
        return {"validation": held} if len(held) else {}  # pyright: ignore[reportReturnType]

    def _stream(self, sequence_multiple: int) -> TrainingStream:
        pipeline, tokenizer = self._streamed
        if self.pack_size is None:
            return TrainingStream(pipeline, PaddedRows(pipeline, tokenizer, self.seed, self._pad_id))
        packed = PackedRows(pipeline, tokenizer, self.seed, self.pack_size, sequence_multiple, self.global_batch_size)
        return TrainingStream(pipeline, packed)

    def _check_sets(self, sets: Any) -> None:
        """Refuse what `datasets` must not return.

        Raises:
            DataError: names the class and what it returns.
        """
        whose = type(self).__name__
        if self.judges:
            return
        if not isinstance(sets, dict) or "train" not in sets or not sets.keys() <= set(SPLITS):
            found = f"a dict of {', '.join(map(str, sets))}" if isinstance(sets, dict) else f"a {type(sets).__name__}"
            raise DataError(f"{whose}.datasets() returns {found}; it must be a dict of train, validation and test.")
        if not len(sets["train"]):
            raise DataError(f"{whose} has no training samples.")
        if type(self).make_collate is not DataModule.make_collate:  # it knows its own samples
            return
        for name, samples in sets.items():
            if self.pack_size is not None and not hasattr(samples, "lengths"):
                raise DataError(f"{whose}: packing needs {type(samples).__name__}.lengths, the length of each sample.")
            sample = samples[0] if len(samples) else None
            if sample is not None and not _is_sample(sample):
                raise DataError(
                    f"{whose}: sample 0 of {name} must be a dict with tokens (n + 1 numbers) and loss_mask (n numbers)."
                )

    def samples(self, split: str) -> Any:
        """A split's samples one by one, packed or not; None where there is no such split."""
        return self._sets.get(split)

    def rows(self, split: str, sequence_multiple: int = 1) -> Any:
        """What the rows of microbatches are taken from: a split's samples, or packs of them."""
        samples = self._sets[split]
        if self.pack_size is None:
            return samples
        if (split, sequence_multiple) not in self._packed:
            lengths = np.asarray(samples.lengths)  # pyright: ignore[reportAttributeAccessIssue]
            packed = PackedDataset(samples, lengths, self.pack_size, sequence_multiple)
            self._packed[split, sequence_multiple] = packed
        return self._packed[split, sequence_multiple]

    def make_collate(self, rows: Any, *, length: int | None, multiple: int, sequence_multiple: int) -> Any:
        """What makes a microbatch of rows.

        Args:
            rows: As `rows` gave them; None where they are streamed.
            length: Tokens per row; None takes as few as hold the longest.
            multiple: What that is rounded up to.
            sequence_multiple: What each sequence of a pack is rounded up to.
        """
        if self.pack_size is None:
            return PadCollate(self._pad_id, length, multiple)
        assert self.packed_sequence_specs is not None
        constant = self.packed_sequence_specs.pad_cu_seqlens
        size = int(np.diff(rows.packs.starts).max()) + 2 if constant else None
        return PackCollate(self._pad_id, length, multiple, sequence_multiple, size)

    def train_order(self, rows: Any) -> EpochOrder:
        """The order of the training rows."""
        if self.pack_size is not None:
            return Balanced(rows.costs, self.global_batch_size, self.seed)
        return Shuffled(len(rows), self.seed) if self.shuffles else in_turn(len(rows))

    def train_batches(
        self,
        place: DataParallelPlace,
        *,
        consumed_samples: int = 0,
        multiple: int = 8,
        sequence_multiple: int = 1,
        fixed: bool = False,
    ) -> Iterator[Batch]:
        """Endless training microbatches, starting at ``consumed_samples`` of the run's stream.

        Args:
            place: This rank's share.
            consumed_samples: Rows all ranks have taken before (a resumed run's position).
            multiple: What row lengths are rounded up to.
            sequence_multiple: What each sequence of a pack is rounded up to (context parallelism splits each one).
            fixed: Whether every microbatch must have ``row_length`` tokens (pipelines send fixed shapes).
        """
        if self.streaming:
            from mixtral_recipes.data.batches.loading import streamed

            length = self.row_length if fixed or self.fixed_length else None
            collate = self.make_collate(None, length=length, multiple=multiple, sequence_multiple=sequence_multiple)
            stream = self._stream(sequence_multiple)
            batches = StreamedBatches(stream, place, self.micro_batch_size, consumed_samples, collate)
            return streamed(batches, num_workers=self.num_workers)
        rows = self.rows("train", sequence_multiple)
        numbers = place.microbatches(
            sample_stream(self.train_order(rows), len(rows), consumed_samples), self.micro_batch_size
        )
        return self._batches(rows, rows, numbers, multiple, sequence_multiple, fixed)

    def validation_batches(
        self,
        place: DataParallelPlace,
        *,
        limit_batches: int | None,
        multiple: int = 8,
        sequence_multiple: int = 1,
        fixed: bool = False,
        split: str = "validation",
    ) -> Iterator[Batch] | None:
        """Validation microbatches of whole global batches, each row once; None without a validation set.

        Args:
            place: This rank's share.
            limit_batches: Most global batches; None takes the set once.
            multiple: As for training.
            sequence_multiple: As for training.
            fixed: As for training.
            split: ``validation`` or ``test``.
        """
        batches = self.num_validation_batches(limit_batches, sequence_multiple=sequence_multiple, split=split)
        if not batches:
            return None
        rows = self.rows(split, sequence_multiple)
        numbers = place.microbatches(iter(range(batches * self.global_batch_size)), self.micro_batch_size)
        return self._batches(rows, WithBlanks(rows), numbers, multiple, sequence_multiple, fixed)

    def num_validation_batches(
        self, limit_batches: int | None, *, sequence_multiple: int = 1, split: str = "validation"
    ) -> int:
        """Global batches per validation; rows that count nothing fill the last one up."""
        if split not in self._sets:
            return 0
        whole = -(-len(self.rows(split, sequence_multiple)) // self.global_batch_size)
        return whole if limit_batches is None else min(whole, limit_batches)

    def _batches(
        self,
        rows: Any,
        taken_from: Any,
        numbers: Iterator[list[int]],
        multiple: int,
        sequence_multiple: int,
        fixed: bool,
    ) -> Iterator[Batch]:
        from mixtral_recipes.data.batches.loading import microbatches

        length = self.row_length if fixed or self.fixed_length else None
        collate: Callable[[Any], Batch] = self.make_collate(
            rows, length=length, multiple=multiple, sequence_multiple=sequence_multiple
        )
        return microbatches(taken_from, numbers, collate, num_workers=self.num_workers)


def _is_sample(sample: Any) -> bool:
    try:
        return len(sample["tokens"]) == len(sample["loss_mask"]) + 1
    except (TypeError, KeyError, IndexError):
        return False


def _pad_id(tokenizer: Any) -> int:
    """A token for padding; its positions are masked, so any valid id will do."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0
