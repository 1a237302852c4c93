"""A tensor's rows on their way into a GGUF file: read, compared, and brought into the file's type."""

import hashlib

import numpy as np
import torch

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, LikeSource, Rows, is_finite, read_tensor, torch_dtype
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.gguf.extra import package


class Hashed(LikeSource):
    """Rows whose hash is taken while they are read, front to back by one thread; some may be read again.

    Attributes:
        digest: SHA-256 of those read so far.
    """

    def __init__(self, source: Rows) -> None:
        super().__init__(source)
        self.digest = hashlib.sha256()
        self._next = 0

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        self._source.read(start, count, out)
        if start <= self._next < start + count:
            self.digest.update(out[(self._next - start) * self.row_bytes : count * self.row_bytes])
            self._next = start + count


class Encoded:
    """Rows in a type of GGUF's.

    Args:
        name: The canonical tensor, for errors.
        source: Its rows, in a float type.
        type: What they become, by its name in ``GGMLQuantizationType``.
        row_bytes: Bytes of a row in that type.
    """

    def __init__(self, name: str, source: Rows, type: str, row_bytes: int) -> None:
        self._name, self._source, self._type = name, source, type
        self.dtype = f"GGML {type}"  # none that a weight of a checkpoint has: nothing here is cast or checked again
        self.rows, self.row_bytes = source.rows, row_bytes

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``; gguf quantizes, torch rounds to 16 bits (to even).

        Raises:
            CheckpointError: a value is not finite, or too large for 16 bits.
        """
        values = read_tensor(self._source, start, count, self._source.dtype)
        if not is_finite(memoryview(values.view(torch.uint8).numpy()).cast("B"), self._source.dtype):
            raise CheckpointError(f"{self._name}: contains NaN or Inf; such a checkpoint cannot be converted.")
        target = np.frombuffer(out, dtype=np.uint8)[: count * self.row_bytes]
        if self._type in ITEM_BYTES:
            encoded = values.to(torch_dtype(self._type)).view(torch.uint8).numpy()
            if not is_finite(memoryview(encoded).cast("B"), self._type):
                raise CheckpointError(
                    f"{self._name}: holds {values.abs().max().item():.5g}, too large for {self._type}; use "
                    "--quantization bf16 or q8_0."
                )
        else:
            gguf = package("gguf")
            encoded = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[self._type])
        target[:] = encoded.reshape(-1)
