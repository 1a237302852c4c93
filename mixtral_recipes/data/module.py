"""What every data module is: datasets made once a tokenizer is known, and microbatches for one rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from mixtral_recipes.data.batch import Batch, DataParallelPlace, MicrobatchSampler, PadCollate, Sample, microbatches
from mixtral_recipes.errors import DataError


@dataclass
class DataModule:
    """Base of the data modules; subclasses implement `datasets`.

    Attributes:
        seq_length: Most tokens of a sequence.
        micro_batch_size: Sequences per forward pass of one data-parallel rank.
        global_batch_size: Sequences per optimizer step.
        num_workers: Loader processes per rank; 0 loads in the training process.
        seed: Seed of the order.
    """

    seq_length: int = 2048
    micro_batch_size: int = 1
    global_batch_size: int = 8
    num_workers: int = 0
    seed: int = 1234

    # Whether every microbatch has seq_length tokens, or only as many as its longest sample.
    fixed_length = True

    def datasets(self, tokenizer: Any) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
        """Make the training and validation sets.

        Args:
            tokenizer: A transformers tokenizer, or None for data that needs none.
        """
        raise TypeError(f"{type(self).__name__} must define datasets()")

    def setup(self, tokenizer: Any) -> None:
        """Make the datasets; called once on every rank before batches are asked for."""
        self._train, self._validation = self.datasets(tokenizer)
        self._pad_id = _pad_id(tokenizer)
        if not len(self._train):  # pyright: ignore[reportArgumentType]
            raise DataError(f"{type(self).__name__} has no training samples.")

    def train_batches(
        self, place: DataParallelPlace, *, consumed_samples: int = 0, multiple: int = 8, fixed: bool = False
    ) -> Iterator[Batch]:
        """Training microbatches without end, from ``consumed_samples`` of the run's stream on.

        Args:
            place: This rank's share.
            consumed_samples: Samples all ranks have taken before (a resumed run's position).
            multiple: What sequence lengths are rounded up to.
            fixed: Whether every microbatch must have ``seq_length`` tokens (pipelines send fixed shapes).
        """
        return self._batches(self._train, place, consumed_samples, multiple, fixed, shuffle=True, limit=None)

    def validation_batches(
        self, place: DataParallelPlace, *, limit_batches: int | None, multiple: int = 8, fixed: bool = False
    ) -> Iterator[Batch] | None:
        """Validation microbatches of whole global batches, always the same ones; None without a validation set.

        Args:
            place: This rank's share.
            limit_batches: Most global batches; None takes the set once.
            multiple: As for training.
            fixed: As for training.
        """
        batches = self.num_validation_batches(limit_batches)
        if not batches:
            return None
        limit = batches * self.global_batch_size
        return self._batches(self._validation, place, 0, multiple, fixed, shuffle=False, limit=limit)

    def num_validation_batches(self, limit_batches: int | None) -> int:
        """Global batches per validation (the last one wraps around when the set does not divide)."""
        if self._validation is None:
            return 0
        whole = -(-len(self._validation) // self.global_batch_size)  # pyright: ignore[reportArgumentType]
        return whole if limit_batches is None else min(whole, limit_batches)

    def _batches(
        self,
        dataset: Any,
        place: DataParallelPlace,
        consumed: int,
        multiple: int,
        fixed: bool,
        *,
        shuffle: bool,
        limit: int | None,
    ) -> Iterator[Batch]:
        sampler = MicrobatchSampler(
            len(dataset),
            self.micro_batch_size,
            place,
            seed=self.seed,
            shuffle=shuffle,
            consumed_samples=consumed,
            limit_samples=limit,
        )
        length = self.seq_length if fixed or self.fixed_length else None
        collate = PadCollate(self._pad_id, length, multiple)
        return microbatches(dataset, sampler, collate, num_workers=self.num_workers)


def _pad_id(tokenizer: Any) -> int:
    """A token to fill with; its positions are masked, so any valid id does."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0
