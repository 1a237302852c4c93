"""The tensors of a Hugging Face folder by content, read once and not kept."""

import hashlib
from collections.abc import Mapping
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
    if hashes:
        try:
            with ThreadPoolExecutor(io_threads()) as pool:
                digests = pool.map(lambda name: tensor_hash(source.tensors[name], wanted[name]), found)
                for name, digest in zip(found, digests, strict=True):
                    found[name]["sha256"] = digest
        finally:
            close_inputs()
    return found


def holds(source: Source, recorded: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a source's tensors are those a manifest recorded; reads on until one differs.

    Args:
        source: The opened folder.
        recorded: Name -> "dtype", "shape" and "sha256"; tensors are cast to that dtype first.
    """
    shapes = canonical_shapes(source.dims)
    if {name: list(shape) for name, shape in shapes.items()} != {n: list(t["shape"]) for n, t in recorded.items()}:
        return False
    names = list(recorded)
    at_once = 4 * io_threads()
    try:
        with ThreadPoolExecutor(io_threads()) as pool:
            for start in range(0, len(names), at_once):
                some = names[start : start + at_once]
                digests = pool.map(lambda name: tensor_hash(source.tensors[name], recorded[name]["dtype"]), some)
                if any(digest != recorded[name]["sha256"] for name, digest in zip(some, digests, strict=True)):
                    return False
    finally:
        close_inputs()
    return True


def tensor_hash(rows: Rows, dtype: str) -> str:
    """SHA-256 of a tensor's bytes, cast to ``dtype``."""
    digest = hashlib.sha256()
    for piece in pieces(rows):
        digest.update(read_as(rows, *piece, dtype))
    return digest.hexdigest()
