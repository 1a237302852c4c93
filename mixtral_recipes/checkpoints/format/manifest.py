"""A checkpoint folder's manifest.

    CKPT/weights/        Megatron torch_dist
    CKPT/context/        config.json, generation_config.json, tokenizer files
    CKPT/manifest.json   what this is, where it came from, size and SHA-256 of every file

A file's entry has "sha256", or "pieces": the lengths and hashes of the consecutive pieces it was written in. Import
hashes each tensor as it writes it; the pieces make those the file's hashes too, and let several threads check one file.

Pure Python; importers and training both use it.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import now, sha256, write_text
from mixtral_recipes.system.json_files import hash_of, read_object
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.schema import Count, Sha256, typed

FORMAT = "mixtral-recipes/1"
NAME = "manifest.json"
Kind = Literal["model", "training", "adapter", "quantized"]
Pieces = list[tuple[int, str]]  # length and SHA-256 of the consecutive pieces of a file


class _File(TypedDict):
    size: Count
    sha256: NotRequired[Sha256]
    pieces: NotRequired[list[tuple[Count, Sha256]]]


class _Tensor(TypedDict):
    dtype: NotRequired[str]
    shape: NotRequired[list[Count]]
    sha256: NotRequired[Sha256]


class _Manifest(TypedDict):
    """The fields of every manifest; further ones of older or newer releases are ignored."""

    format: str
    kind: Kind
    created: str
    source: NotRequired[dict[str, Any]]
    files: Annotated[dict[str, _File], Meta(min_length=1)]
    tensors: NotRequired[dict[str, _Tensor]]
    seal: str


def write_manifest(
    folder: Path,
    kind: Kind,
    *,
    source: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    known: Mapping[str, Pieces] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Describe every file in a checkpoint folder; call it when all of them are written.

    Args:
        folder: The checkpoint (or its staging folder).
        kind: What the checkpoint holds.
        source: Where it came from (Hub id and revision, recipe, step).
        tensors: name -> {"dtype", "shape", "sha256"} of the weights, where they are known.
        known: relative path -> pieces, for files hashed while they were written.
        extra: Further top-level keys.
    """
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "created": now(),
        "source": dict(source or {}),
        **(extra or {}),
        "files": file_entries(folder, known),
        "tensors": dict(tensors or {}),
    }
    manifest["seal"] = _seal(manifest)
    write_text(folder / NAME, _as_text(manifest))


def file_entries(folder: Path, known: Mapping[str, Pieces] | None = None) -> dict[str, dict[str, Any]]:
    """Relative path -> {"size", and "sha256" or "pieces"} of every file in a folder but the manifest."""
    known = known or {}
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if path != NAME]
    with ThreadPoolExecutor(io_threads()) as pool:
        hashes = list(pool.map(lambda path: None if path in known else sha256(folder / path), paths))
    return {
        path: {"size": (folder / path).stat().st_size, **({"sha256": digest} if digest else {"pieces": known[path]})}
        for path, digest in zip(paths, hashes, strict=True)
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: the folder is not one of our checkpoints, or its manifest is damaged.
    """
    path = folder / NAME
    if not folder.is_dir():
        removed = "; its run may have removed it (log.ckpt.save_top_k)" if folder.parent.name == "checkpoints" else ""
        raise CheckpointError(f"{folder} does not exist{removed}.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no manifest.json, so it is not a finished mixtral-recipes checkpoint; `mixtral-recipes "
            "import` converts a Hugging Face folder into one."
        )
    manifest = read_object(path, CheckpointError)
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest['format']!r} is not supported; the only supported format is {FORMAT!r}."
        )
    if "seal" in manifest and manifest["seal"] != _seal(manifest):
        raise CheckpointError(f"{path}: damaged: its seal (a hash of the rest of the file) does not match.")
    typed(manifest, _Manifest, f"{path}: damaged, or not a checkpoint manifest", CheckpointError)
    for name, entry in manifest["files"].items():
        if "sha256" not in entry and "pieces" not in entry:
            raise CheckpointError(f"{path}: damaged: it has no hash for {name}.")
        if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{path}: names {name!r}, which is outside the checkpoint.")
    return manifest


def _seal(manifest: Mapping[str, Any]) -> str:
    """A hash of the manifest's own content, which reveals damage to it."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hash_of(content)


def pieces_of(entry: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Start, length and expected hash of the stretches a file is checked in."""
    if "pieces" not in entry:
        return [(0, entry["size"], entry["sha256"])]
    found: list[tuple[int, int, str]] = []
    start = 0
    for length, digest in entry["pieces"]:
        found.append((start, length, digest))
        start += length
    if start != entry["size"]:
        raise CheckpointError(f"the manifest's pieces add up to {start} of {entry['size']} bytes; it is damaged.")
    return found


def _as_text(manifest: dict[str, Any]) -> str:
    """JSON with one line per file and tensor."""
    blocks = []
    for key, value in manifest.items():
        if key in ("files", "tensors") and value:
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            blocks.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        else:
            blocks.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
