"""A GGUF file as others read it: gguf says where its tensors are, and what their bytes mean."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.importers.gguf.extra import package
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.machine import io_threads

HEADER = "(header)"  # everything before the first tensor: sizes, tokenizer, chat template


class StoredFile:
    """A GGUF file that was opened.

    Attributes:
        path: The file.
        tensors: What it holds by name, as gguf's ``ReaderTensor``.
    """

    def __init__(self, path: Path) -> None:
        """Read what is before the tensors.

        Raises:
            CheckpointError: it is no GGUF file, or not whole.
        """
        gguf = package("gguf")
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # what an invalid file raises is not documented
            raise CheckpointError(f"{path}: not a GGUF file, or incomplete ({in_short(error)}).") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str) -> Any:
        """A value of the metadata; None where there is none."""
        found = self._reader.get_field(name)
        return None if found is None else found.contents()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows last as everywhere but in GGUF's own files."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def rows(self, name: str) -> np.ndarray:
        """A tensor's bytes, mapped: [rows, bytes of a row]; of a vector, one row."""
        tensor = self.tensors[name]
        data = np.asarray(tensor.data).reshape(-1).view(np.uint8)
        height = int(np.prod(self.shape(name)[:-1]))
        return data.reshape(height, -1)

    def values(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some of a tensor's rows as gguf reads them, [rows, columns] float32."""
        gguf = package("gguf")
        kind = self.tensors[name].tensor_type
        found = gguf.quants.dequantize(np.ascontiguousarray(self.rows(name)[start:stop]), kind)
        return found.reshape(stop - start, -1)

    def entries(self, *, hashes: bool, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, dict[str, Any]]:
        """Name -> "dtype", "shape" and "sha256" of every tensor, and of all that is before them.

        Args:
            hashes: Whether the file is read; otherwise "sha256" is left out.
            on_bytes: Called with the number of bytes each time some are read, from any thread.
        """
        found: dict[str, dict[str, Any]] = {HEADER: header_entry(self.header if hashes else None)}
        found |= {
            name: {"dtype": tensor.tensor_type.name, "shape": list(self.shape(name))}
            for name, tensor in self.tensors.items()
        }
        if hashes:

            def hashed(name: str) -> None:
                offset, size = int(self.tensors[name].data_offset), int(self.tensors[name].n_bytes)
                found[name]["sha256"] = sha256(self.path, offset, size)
                on_bytes(size)

            with ThreadPoolExecutor(io_threads()) as pool:
                list(pool.map(hashed, self.tensors))
        return found

    @property
    def header(self) -> bytes:
        """Everything before the first tensor."""
        start = min(tensor.data_offset for tensor in self.tensors.values())
        with self.path.open("rb") as file:
            return file.read(int(start))


def header_entry(content: bytes | None) -> dict[str, Any]:
    """The entry of what is before the tensors; None leaves its hash out."""
    return {"dtype": "GGUF", "shape": []} | ({"sha256": hashlib.sha256(content).hexdigest()} if content else {})
