"""Tokenized samples on disk: written once by the first process, mapped into memory by all of them.

A store is a folder: ``tokens.bin`` (all samples one after the other), ``learned.bin`` (one byte per token: whether the
loss counts it) and ``starts.npy``.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.batches.fit import Encoded, Tally
from mixtral_recipes.data.cache import prepared, sampled_hash, save_array

_FILES = ("tokens.bin", "learned.bin", "starts.npy")


class SampleStore:
    """The samples of one split.

    Attributes:
        folder: Where they are.
        lengths: [n], positions each sample takes: its tokens less one.
        tally: What became of the split's records.
    """

    def __init__(self, folder: Path) -> None:
        """Open a store."""
        self.folder = folder
        about = json.loads((folder / "about.json").read_text())
        self.tally = Tally.of(about["tally"])
        self._dtype = np.dtype(about["dtype"])
        self._starts = np.load(folder / "starts.npy")
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


Splits = Mapping[str, tuple[Iterable[Encoded], Tally]]


def tokenized_splits(
    made_from: Mapping[str, Any], splits: Callable[[Path], Splits], *, vocab_size: int
) -> dict[str, SampleStore]:
    """The stores of every split, tokenizing in the first process that asks.

    Args:
        made_from: All that the samples depend on.
        splits: Given the folder of all stores, gives the samples of each split, and the tally that counts them.
        vocab_size: Decides whether tokens take two bytes or four.
    """

    def build(folder: Path) -> None:
        for name, (samples, tally) in splits(folder).items():
            write_store(folder / name, samples, tally, vocab_size)

    folder = prepared("samples", made_from, build)
    return {child.name: SampleStore(child) for child in sorted(folder.iterdir()) if child.is_dir()}


def content_of(stores: Mapping[str, SampleStore]) -> str:
    """A digest of the tokens of all splits, and of which are learned; 16 hexadecimal digits."""
    files = [store.folder / name for _, store in sorted(stores.items()) for name in _FILES]
    return hashlib.sha256("".join(map(sampled_hash, files)).encode()).hexdigest()[:16]


def write_store(folder: Path, samples: Iterable[Encoded], tally: Tally, vocab_size: int) -> None:
    """Write a store, sample by sample; the tally is complete when the samples are at their end."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    folder.mkdir(parents=True)
    counts = array("q")
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learned.bin").open("wb") as learned:
        for sample in samples:
            tokens.write(np.array(sample.tokens, dtype).tobytes())
            learned.write(np.array(sample.learned, np.bool_).tobytes())
            counts.append(len(sample.tokens))
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    save_array(folder / "starts.npy", starts)
    (folder / "about.json").write_text(json.dumps({"dtype": dtype.name, "tally": tally.as_dict()}))
