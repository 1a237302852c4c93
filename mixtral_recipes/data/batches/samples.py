"""Tokenized samples on disk: written once by the first process, mapped into memory by all of them.

A store is a folder: ``tokens.bin`` (all samples one after the other), ``learned.bin`` (one byte per token: whether the
loss counts it) and ``starts.npy``.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.cache import prepared
from mixtral_recipes.errors import DataError

_FORMAT = 1  # raise when the same records would give other samples


class Encoded(NamedTuple):
    """A tokenized record: ``tokens`` and, for each, whether it is ``learned``."""

    tokens: list[int]
    learned: list[bool]


class SampleStore(Dataset[Sample]):
    """The samples of one split.

    Attributes:
        folder: Where they are.
        lengths: [n], positions each sample takes: its tokens less one.
        truncated: How many were cut to the sequence length.
        dropped: How many had nothing left to learn.
    """

    def __init__(self, folder: Path, first: int = 0, last: int | None = None) -> None:
        """Open samples ``first`` to ``last`` (exclusive) of a store; None goes to its end."""
        self.folder = folder
        about = json.loads((folder / "about.json").read_text())
        self.truncated, self.dropped = about["truncated"], about["dropped"]
        self._dtype = np.dtype(about["dtype"])
        starts = np.load(folder / "starts.npy")
        self._starts = starts[first : (len(starts) - 1 if last is None else last) + 1]
        self.lengths = np.diff(self._starts) - 1
        self._map()

    def _map(self) -> None:
        empty = not self._starts[-1]
        self._tokens = np.empty(0) if empty else np.memmap(self.folder / "tokens.bin", self._dtype, "r")
        self._learned = np.empty(0) if empty else np.memmap(self.folder / "learned.bin", np.bool_, "r")

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes map the files again instead of receiving their content."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_learned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        return Sample(tokens=self._tokens[start:end], loss_mask=self._learned[start + 1 : end])

    def split_off(self, proportion: float) -> tuple["SampleStore", "SampleStore | None"]:
        """Hold out the last ``proportion`` of the samples."""
        held_out = round(len(self) * proportion)
        if not held_out or held_out == len(self):
            return self, None
        border = len(self) - held_out
        return SampleStore(self.folder, 0, border), SampleStore(self.folder, border)


@dataclass(frozen=True)
class Fit:
    """How a sample that is too long is cut.

    Attributes:
        seq_length: Most positions; a sample has one token more.
        keep_end: Cut after the first token (a long prompt has its question and answer at the end); otherwise cut the
            end.
    """

    seq_length: int
    keep_end: bool

    def __call__(self, encoded: Encoded) -> Encoded:
        """The sample, cut where it must be."""
        excess = len(encoded.tokens) - (self.seq_length + 1)
        if excess <= 0:
            return encoded
        if not self.keep_end:
            return Encoded(encoded.tokens[:-excess], encoded.learned[:-excess])
        tokens, learned = encoded
        return Encoded(tokens[:1] + tokens[1 + excess :], learned[:1] + learned[1 + excess :])


def tokenized_splits(
    made_from: Mapping[str, Any], splits: Callable[[], Mapping[str, Iterable[Encoded]]], fit: Fit, *, vocab_size: int
) -> dict[str, SampleStore]:
    """The stores of every split, tokenizing in the first process that asks.

    Args:
        made_from: All that the samples depend on.
        splits: Gives the records of each split, tokenized.
        fit: How samples are cut.
        vocab_size: Decides whether tokens take two bytes or four.

    Raises:
        DataError: a split has records but nothing to learn.
    """

    def build(folder: Path) -> None:
        for name, encoded in splits().items():
            write_store(folder / name, encoded, fit, vocab_size)

    key = {**made_from, "fit": [fit.seq_length, fit.keep_end], "format": _FORMAT}
    folder = prepared("samples", key, build)
    return {child.name: SampleStore(child) for child in sorted(folder.iterdir()) if child.is_dir()}


def write_store(folder: Path, samples: Iterable[Encoded], fit: Fit, vocab_size: int) -> None:
    """Write a store, sample by sample."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    folder.mkdir(parents=True)
    counts: list[int] = []
    truncated = dropped = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learned.bin").open("wb") as learned:
        for sample in samples:
            fitted = fit(sample)
            if not any(fitted.learned[1:]):
                dropped += 1
                continue
            truncated += fitted is not sample
            tokens.write(np.array(fitted.tokens, dtype).tobytes())
            learned.write(np.array(fitted.learned, np.bool_).tobytes())
            counts.append(len(fitted.tokens))
    if not counts and dropped:
        raise DataError(f"{folder.name}: none of {dropped} records has an answer within {fit.seq_length} tokens.")
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    np.save(folder / "starts.npy", starts)
    about = {"dtype": dtype.name, "truncated": truncated, "dropped": dropped, "samples": len(counts)}
    (folder / "about.json").write_text(json.dumps(about))
    if truncated or dropped:
        print(
            f"data: {folder.name}: {len(counts)} samples, {truncated} cut to seq_length={fit.seq_length}, "
            f"{dropped} left out (no answer left to learn)",
            file=sys.stderr,
        )
