"""Packing: several samples in one row, to keep padding low.

`pack` is best-fit-decreasing on counts: samples of one length are placed together, so its work grows with the number
of different lengths, and the bins are exactly those of the textbook algorithm.

Shape suffixes: n samples, p packs, s tokens of a row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Batch, Sample
from mixtral_recipes.data.cache import prepared, save_array
from mixtral_recipes.errors import DataError


@dataclass(frozen=True)
class Packs:
    """Which samples are in which pack.

    Attributes:
        samples: [n], sample numbers, pack after pack.
        starts: [p + 1], where each pack begins in ``samples``.
    """

    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, pack: int) -> np.ndarray:
        """Sample numbers of one pack."""
        return self.samples[self.starts[pack] : self.starts[pack + 1]]

    def sums(self, of: np.ndarray) -> np.ndarray:
        """Add up a per-sample quantity [n] per pack, [p]."""
        return np.add.reduceat(of[self.samples], self.starts[:-1])


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Pack by best-fit-decreasing: each sample, longest first, goes where the least room is left behind it.

    Args:
        lengths: [n], tokens per sample, 1 to ``capacity``.
        capacity: Tokens per pack.

    Raises:
        DataError: a length is not in that range.
    """
    lengths = np.asarray(lengths)
    if not len(lengths):
        return Packs(np.empty(0, np.int64), np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        worst = lengths.argmax() if lengths.max() > capacity else lengths.argmin()
        raise DataError(f"sample {worst} has {lengths[worst]} tokens; a pack can hold 1 to {capacity}.")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bins = _expand(_place(counts, capacity))
    # Longest first; 16-bit keys are sorted by counting.
    order = np.argsort((capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64), kind="stable")
    return _by_pack(order, bins)


def _place(counts: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit-decreasing on counts.

    Args:
        counts: [capacity + 1], samples of each length.
        capacity: Tokens per pack.

    Returns:
        [runs, 3] in the order samples are placed, longest first: "bins first, first + 1, ... first + number - 1 take
        per_bin samples each", as (first, number, per_bin).
    """
    shortest = int(np.flatnonzero(counts)[0])
    runs: list[tuple[int, int, int]] = []
    room = _Room(capacity)
    opened = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            residual = room.smallest(length)
            if residual < 0:
                residual = capacity
                number = -(-remaining // (capacity // length))
                first, opened = opened, opened + number
            else:
                first, number = room.take(residual)
            # The bin with the least sufficient room stays that until less than one more sample fits.
            per_bin = residual // length
            filled = min(number, remaining // per_bin)
            if filled:
                runs.append((first, filled, per_bin))
                remaining -= filled * per_bin
                if residual - per_bin * length >= shortest:
                    room.give(residual - per_bin * length, first, filled)
            if filled < number:
                first, number = first + filled, number - filled
                if remaining:  # fewer than per_bin
                    runs.append((first, 1, remaining))
                    if residual - remaining * length >= shortest:
                        room.give(residual - remaining * length, first, 1)
                    remaining, first, number = 0, first + 1, number - 1
                if number:
                    room.give(residual, first, number)
    return np.array(runs, np.int64)


class _Room:
    """Open bins by the room left in them: ranges of bin numbers, and a two-level bitmap of the rooms that occur."""

    _WORD = 256

    def __init__(self, capacity: int) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._words = [0] * (capacity // self._WORD + 1)
        self._summary = 0

    def smallest(self, at_least: int) -> int:
        """The smallest room there is that is large enough; -1 when there is none."""
        number, bit = divmod(at_least, self._WORD)
        word = self._words[number] >> bit
        if word:
            return at_least + (word & -word).bit_length() - 1
        later = self._summary >> (number + 1)
        if not later:
            return -1
        number += (later & -later).bit_length()
        word = self._words[number]
        return number * self._WORD + (word & -word).bit_length() - 1

    def take(self, room: int) -> tuple[int, int]:
        """Remove one range (first bin, number of bins) of bins with that room."""
        ranges = self._ranges[room]
        taken = ranges.pop()
        if not ranges:
            number, bit = divmod(room, self._WORD)
            self._words[number] &= ~(1 << bit)
            if not self._words[number]:
                self._summary &= ~(1 << number)
        return taken

    def give(self, room: int, first: int, number: int) -> None:
        """Add a range of bins with that room."""
        ranges = self._ranges.setdefault(room, [])
        if not ranges:
            word, bit = divmod(room, self._WORD)
            self._words[word] |= 1 << bit
            self._summary |= 1 << word
        ranges.append((first, number))


def _expand(runs: np.ndarray) -> np.ndarray:
    """The bin of each sample, longest first, from `_place`'s runs."""
    first, number, per_bin = runs.T
    begin = np.cumsum(number) - number
    bins = np.arange(int(number.sum()), dtype=np.int64) + np.repeat(first - begin, number)
    return np.repeat(bins, np.repeat(per_bin, number))


def _by_pack(order: np.ndarray, bins: np.ndarray) -> Packs:
    """Group samples by bin, keeping their order within each."""
    counts = np.bincount(bins)
    low = np.argsort((bins & 0xFFFF).astype(np.uint16), kind="stable")
    high = np.argsort((bins[low] >> 16).astype(np.uint16), kind="stable")
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return Packs(order[low[high]], starts)


@dataclass(frozen=True)
class Balanced:
    """An order in which neighbouring packs cost about the same and every step has packs of all costs.

    Packs are sorted by cost, a little noise added, and cut into tiles of a few neighbours; the tiles are cut into as
    many strata as a step has tiles, and each step takes one tile of each stratum, drawn anew every epoch. Data-parallel
    ranks read neighbouring packs, so that within a microbatch they wait little for one another.

    Attributes:
        costs: [p], cost of each pack.
        window: Packs per step (the global batch size).
        seed: Seed of the draw.
    """

    costs: np.ndarray
    window: int
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """Every pack once."""
        draw = np.random.default_rng([self.seed, epoch])
        packs = draw.permutation(len(self.costs))
        steps = len(packs) // self.window
        even, left_over = packs[: steps * self.window], packs[steps * self.window :]
        noisy = self.costs[even] * draw.uniform(1.0, 1.1, len(even))  # other neighbours every epoch
        tile = self._tile()
        strata = even[np.argsort(-noisy)].reshape(self.window // tile, steps, tile)
        turns = np.argsort(draw.random(strata.shape[:2]), axis=1)
        drawn = np.take_along_axis(strata, turns[:, :, None], axis=1)
        return np.concatenate([drawn.swapaxes(0, 1).ravel(), left_over])

    def _tile(self) -> int:
        """The largest power of two that divides the step and is no more than its square root."""
        tile = 1
        while self.window % (2 * tile) == 0 and 4 * tile * tile <= self.window:
            tile *= 2
        return tile


class PackedDataset:
    """Packs of a dataset's samples; item i is the list of samples in pack i.

    Attributes:
        packs: Which samples are packed together.
        costs: [p], attention cost of each pack: the sum of its squared lengths.
    """

    def __init__(self, samples: Any, lengths: np.ndarray, capacity: int, sequence_multiple: int = 1) -> None:
        """Pack, or read the packs that were made of the same lengths before.

        Args:
            samples: What is packed; indexed by sample number.
            lengths: [n], positions each sample takes (its tokens less one).
            capacity: Tokens per pack.
            sequence_multiple: What each sample is rounded up to.
        """
        self.samples = samples
        rounded = -(-np.asarray(lengths, np.int64) // sequence_multiple) * sequence_multiple
        self.packs = _packs_once(rounded, capacity)
        self.costs = self.packs.sums(np.square(rounded)) if len(rounded) else rounded

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Sample]:
        return [self.samples[int(number)] for number in self.packs.members(index)]


def _packs_once(lengths: np.ndarray, capacity: int) -> Packs:
    """Packs of these lengths, cached on disk where they take long to make."""
    if len(lengths) < 100_000:
        return pack(lengths, capacity)
    digest = hashlib.sha256(np.ascontiguousarray(lengths).tobytes()).hexdigest()

    def build(folder: Path) -> None:
        packs = pack(lengths, capacity)
        save_array(folder / "samples.npy", packs.samples)
        save_array(folder / "starts.npy", packs.starts)

    folder = prepared("packs", {"lengths": digest, "capacity": capacity}, build)
    return Packs(np.load(folder / "samples.npy", mmap_mode="r"), np.load(folder / "starts.npy", mmap_mode="r"))


@dataclass(frozen=True)
class PackCollate:
    """Concatenates the samples of one pack.

    Positions start at 0 with each sample, and ``cu_seqlens`` marks the borders, so that no token sees another sample.
    The padding of samples (to ``sequence_multiple``) and of the row is marked in ``padding_mask``.

    Attributes:
        pad_id: The padding token.
        length: Tokens per row; None takes as few as hold the pack.
        multiple: What that is rounded up to.
        sequence_multiple: What each sample is rounded up to.
        cu_seqlens_size: Entries of ``cu_seqlens``; None takes as many as there are borders.
    """

    pad_id: int
    length: int | None = None
    multiple: int = 8
    sequence_multiple: int = 1
    cu_seqlens_size: int | None = None

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """Collate the one row of a microbatch.

        Raises:
            DataError: more than one row: packs need micro_batch_size 1.
        """
        import torch

        if len(rows) != 1:
            raise DataError(f"packed sequences need micro_batch_size=1, not {len(rows)}.")
        samples = rows[0]
        taken = [-(-(len(x["tokens"]) - 1) // self.sequence_multiple) * self.sequence_multiple for x in samples]
        used = sum(taken)
        s = self.length or -(-used // self.multiple) * self.multiple
        tokens = np.full((1, s), self.pad_id, np.int64)
        labels = np.full((1, s), self.pad_id, np.int64)
        loss_mask = np.zeros((1, s), np.float32)
        positions = np.zeros((1, s), np.int64)
        padding = np.ones((1, s), np.bool_)
        borders = np.zeros(len(samples) + 1 + (used < s), np.int32)
        start = 0
        for number, (sample, room) in enumerate(zip(samples, taken, strict=True), 1):
            real = len(sample["tokens"]) - 1
            tokens[0, start : start + real] = sample["tokens"][:-1]
            labels[0, start : start + real] = sample["tokens"][1:]
            loss_mask[0, start : start + real] = sample["loss_mask"]
            positions[0, start : start + room] = np.arange(room)
            padding[0, start : start + real] = False
            start += room
            borders[number] = start
        if used < s:  # what is left of the row is a sequence of its own
            positions[0, used:] = np.arange(s - used)
            borders[-1] = s
        if self.cu_seqlens_size is not None:
            borders = np.pad(borders, (0, self.cu_seqlens_size - len(borders)), constant_values=s)
        batch = Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(loss_mask),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(borders),
        )
        if padding.any():
            batch["padding_mask"] = torch.from_numpy(padding)
        if "source" in samples[0]:  # a pack is of one source
            source = torch.from_numpy(samples[0]["source"])
            batch["sources"] = source[None, None, :].expand(1, s, -1).contiguous()
        return batch
