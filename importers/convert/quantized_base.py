"""The base of a QLoRA adapter as it was trained over: each matrix quantised once more and dequantised, row by row."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import Rows, read_tensor, row_bytes_as, spelled
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.importers.mapping import WEIGHTS, Weight
from mixtral_recipes.importers.model_weights import Change
from mixtral_recipes.peft.quantized.layers import Format, Quantized, base_format
from mixtral_recipes.peft.quantized.split import WHOLE
from mixtral_recipes.system.files import read_json

ORIGINAL = "original"
# Quantised matrices that are kept: more than there are threads, each of which reads one from end to end.
_KEPT = 16
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_Place = tuple[str, int | None, int | None]  # a stacked tensor, layer, expert


def words(into: str) -> str:
    """For people: what adapters were merged into."""
    if into == ORIGINAL:
        return "the original weights, not the quantised ones they were trained on (--merge-into selects those)"
    return f"the {into} weights they were trained on, dequantised"


def merged_into(checkpoint: Path, wanted: str | None) -> str | None:
    """What adapters are merged into, as exports record it: ``original``, ``4bit`` or ``8bit``.

    Args:
        checkpoint: An adapter checkpoint.
        wanted: As the user names it; None takes the original weights.

    Returns:
        None where there is no choice, since the adapters were trained over the original weights.

    Raises:
        CheckpointError: they were not trained over that.
    """
    format = base_format(StoredAdapters(checkpoint).scheme)
    known = (ORIGINAL,) if format is None else (ORIGINAL, f"{format.bits}bit")
    if wanted not in (None, *known):
        raise CheckpointError(
            f"--merge-into {wanted}: {checkpoint} was trained on {known[-1]} weights; use {' or '.join(known)}."
        )
    return None if format is None else wanted or ORIGINAL


def as_trained_over(checkpoint: Path, into: str | None) -> Change | None:
    """What is done to a base's matrices before adapters are merged into them; None leaves them as they are.

    Args:
        checkpoint: The adapter checkpoint; its run.json says in which format, on which kind of device, and in which
            dtype the products were.
        into: As `merged_into` says.
    """
    if into in (None, ORIGINAL):
        return None
    format = base_format(StoredAdapters(checkpoint).scheme)
    assert format is not None
    said = (read_json(checkpoint / "context" / "run.json") or {}).get("trained_over", {})
    return _QuantizedBase(format, said.get("device", "cuda"), _DTYPES.get(said.get("dtype"), torch.float32)).change


def kept_dtype(base: Path) -> str:
    """The dtype of a model's matrices, as safetensors spells it: dequantised ones are cast to it when they are written.

    Raises:
        CheckpointError: it is not a dtype that weights have.
    """
    saved = StoredWeights(base / "weights")
    key = next(weight.disk for weight in WEIGHTS if weight.adapted)
    found = spelled(saved.dtype(key))
    if found is None:
        raise CheckpointError(f"{base}: {key} is {saved.dtype(key)}, which cannot be exported exactly.")
    return found


class _QuantizedBase:
    """The matrices of a base, quantised when they are first read."""

    def __init__(self, format: Format, on: str, dtype: torch.dtype) -> None:
        self._format, self._on, self._dtype = format, on, dtype
        self._lock = threading.Lock()  # a matrix is there in 16 bits while it is quantised: one at a time
        self._matrix = functools.lru_cache(_KEPT)(self._quantize)
        self._sources: dict[_Place, Rows] = {}

    def change(self, weight: Weight, layer: int | None, expert: int | None, base: Rows) -> Rows:
        """The matrix as it was trained over; ``base`` itself where it stayed as it is."""
        if not weight.adapted:
            return base
        place = (weight.disk, layer, expert)
        self._sources[place] = base
        return _Dequantized(base.rows, row_bytes_as(base, "F32"), self._dtype, place, self._read)

    def _read(self, place: _Place) -> Quantized:
        with self._lock:
            return self._matrix(place)

    def _quantize(self, place: _Place) -> Quantized:
        rows = self._sources[place]
        return self._format.quantize(read_tensor(rows, 0, rows.rows, rows.dtype), WHOLE, self._on)


@dataclass(frozen=True)
class _Dequantized:
    """A matrix's rows in fp32, with the values the products had.

    Attributes:
        rows: How many.
        row_bytes: Of each.
        product_dtype: What they were dequantised to.
        place: Which matrix.
        quantized: Gives it quantised.
    """

    rows: int
    row_bytes: int
    product_dtype: torch.dtype
    place: _Place
    quantized: Callable[[_Place], Quantized]
    dtype: str = "F32"

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        values = self.quantized(self.place).rows(start, start + count, self.product_dtype).float()
        np.frombuffer(out, dtype=np.float32, count=values.numel())[:] = values.flatten().numpy()
