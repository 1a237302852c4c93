"""The tensors of a Hugging Face folder by content, read once and not kept."""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.reading import close_inputs
from mixtral_recipes.checkpoints.format.rows import Rows, pieces, read_as
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.importers.mapping import canonical_shapes
from mixtral_recipes.importers.open import open_model
from mixtral_recipes.system.machine import io_threads


def tensors_of(folder: Path, hashes: bool, dtypes: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Name -> "dtype", "shape" and "sha256" of a folder's tensors, as a manifest holds them.

    Args:
        folder: A model folder.
        hashes: Whether they are read; otherwise "sha256" is left out.
        dtypes: What they are cast to, by name; None keeps their own.

    Raises:
        CheckpointError: the folder is not a whole model.
    """
    source = open_model(folder)
    shapes = canonical_shapes(source.dims)
    wanted = {name: (dtypes or {}).get(name, source.tensors[name].dtype) for name in shapes}
    found = {name: {"dtype": wanted[name], "shape": list(shape)} for name, shape in shapes.items()}
    for name, digest in _digests(source, wanted) if hashes else ():
        found[name]["sha256"] = digest
    return found


def holds(source: Source, recorded: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a source's tensors are those a manifest recorded; reads on until one differs.

    Args:
        source: The opened folder.
        recorded: Name -> "dtype", "shape" and "sha256"; tensors are cast to that dtype first.
    """
    shapes = {name: list(shape) for name, shape in canonical_shapes(source.dims).items()}
    if shapes != {name: list(entry["shape"]) for name, entry in recorded.items()}:
        return False
    found = _digests(source, {name: entry["dtype"] for name, entry in recorded.items()})
    return all(digest == recorded[name]["sha256"] for name, digest in found)


def _digests(source: Source, dtypes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and hash of each tensor, cast to its dtype; a few are read at once, so that a reader can stop."""
    names, at_once = list(dtypes), 4 * io_threads()
    try:
        with ThreadPoolExecutor(io_threads()) as pool:
            for start in range(0, len(names), at_once):
                some = names[start : start + at_once]
                yield from zip(some, pool.map(lambda n: tensor_hash(source.tensors[n], dtypes[n]), some), strict=True)
    finally:
        close_inputs()


def tensor_hash(rows: Rows, dtype: str) -> str:
    """SHA-256 of a tensor's bytes, cast to ``dtype``."""
    digest = hashlib.sha256()
    for piece in pieces(rows):
        digest.update(read_as(rows, *piece, dtype))
    return digest.hexdigest()
