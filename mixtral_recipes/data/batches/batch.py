"""Batches: what the model is fed, in which order, and by which rank.

Nothing in the data package loads torch before a batch is made: data sets are checked without it.

Shape suffixes: b sequences of a microbatch, s tokens per sequence.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

import numpy as np

from mixtral_recipes.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class Sample(TypedDict):
    """One sequence: ``tokens`` [n + 1], integers, and ``loss_mask`` [n] (1 where the next token is learned).

    In a mixture also ``source`` [sources], bool: which one it is of.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: NotRequired[np.ndarray]


class Batch(TypedDict):
    """One microbatch.

    Attributes:
        tokens: [b, s], int64.
        labels: [b, s], int64: the next token.
        loss_mask: [b, s], float32: 1.0 where the loss counts.
        position_ids: [b, s], int64.
        padding_mask: [b, s], bool: True where there is no token; absent when there is no padding.
        cu_seqlens: [sequences + 1], int32: borders of packed sequences (b is 1); absent when not packed.
        sources: [b, s, sources], bool: which source of a mixture each token is of; absent where there is one.
    """

    tokens: "Tensor"
    labels: "Tensor"
    loss_mask: "Tensor"
    position_ids: "Tensor"
    padding_mask: "NotRequired[Tensor]"
    cu_seqlens: "NotRequired[Tensor]"
    sources: "NotRequired[Tensor]"


class Samples(Protocol):
    """Samples by position; torch's map-style data sets are such."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class DataParallelPlace:
    """Which share of each global batch this rank reads."""

    rank: int = 0
    size: int = 1

    def share(self, micro_batch_size: int) -> slice:
        """This rank's rows of a microbatch of all ranks."""
        return slice(self.rank * micro_batch_size, (self.rank + 1) * micro_batch_size)

    def microbatches(self, rows: Iterator[Any], micro_batch_size: int) -> Iterator[list[Any]]:
        """This rank's rows of each microbatch, from the rows of all ranks.

        A global batch is the next ``global_batch_size`` rows; microbatch m of rank r has ``micro_batch_size`` of them
        from ``(m * size + r) * micro_batch_size`` on, as Megatron-LM's samplers have it.
        """
        mine = self.share(micro_batch_size)
        while some := list(itertools.islice(rows, micro_batch_size * self.size)):
            yield some[mine]


# The numbers of an epoch's samples, each once: a function of the epoch alone, never of ranks or of what was read.
EpochOrder = Callable[[int], Sequence[int] | np.ndarray]


def in_turn(num_samples: int) -> EpochOrder:
    """The samples in their own order, in every epoch."""
    return lambda epoch: range(num_samples)


@dataclass(frozen=True)
class Shuffled:
    """A permutation per epoch."""

    num_samples: int
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """Every sample number once."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_samples, generator=generator).numpy()


class WithBlanks:
    """Rows, and behind the last one as many more as are asked for: the first row again, with nothing learned."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index < len(self.rows) else _blank(self.rows[0])


def _blank(row: Any) -> Any:
    if isinstance(row, list):  # a pack
        return [_blank(sample) for sample in row]
    mask = row["loss_mask"]
    return {**row, "loss_mask": mask * 0 if hasattr(mask, "shape") else [0] * len(mask)}  # one's own may be a list


def sample_stream(order: EpochOrder, num_samples: int, start: int) -> Iterator[int]:
    """Sample numbers without end, epoch after epoch, from position ``start`` of that stream."""
    epoch, position = divmod(start, num_samples)
    while True:
        numbers = order(epoch)
        for first in range(position, num_samples, 4096):
            yield from map(int, numbers[first : first + 4096])
        epoch, position = epoch + 1, 0


@dataclass(frozen=True)
class PadCollate:
    """Stacks samples, padded to a common length.

    Attributes:
        pad_id: The padding token.
        length: Fixed length; None takes the longest sample's, rounded up.
        multiple: What the length is rounded up to (tensor and context parallelism split it).
    """

    pad_id: int
    length: int | None = None
    multiple: int = 8

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate."""
        import torch

        longest = max(len(sample["tokens"]) - 1 for sample in samples)
        s = self.length or -(-longest // self.multiple) * self.multiple
        if longest > s:
            raise DataError(f"a sample has {longest + 1} tokens, but seq_length={s} allows at most {s + 1}.")
        tokens = np.full((len(samples), s + 1), self.pad_id, np.int64)
        loss_mask = np.zeros((len(samples), s), np.float32)
        padding = np.ones((len(samples), s), np.bool_)
        for row, sample in enumerate(samples):
            n = len(sample["tokens"]) - 1
            tokens[row, : n + 1] = sample["tokens"]
            loss_mask[row, :n] = sample["loss_mask"]
            padding[row, :n] = False
        batch = Batch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(tokens[:, 1:].copy()),
            loss_mask=torch.from_numpy(loss_mask),
            position_ids=torch.arange(s).expand(len(samples), -1).contiguous(),
        )
        if padding.any():
            batch["padding_mask"] = torch.from_numpy(padding)
        if "source" in samples[0]:
            sources = np.stack([sample["source"] for sample in samples])  # pyright: ignore[reportTypedDictNotRequiredAccess]
            batch["sources"] = torch.from_numpy(sources)[:, None, :].expand(-1, s, -1).contiguous()
        return batch
