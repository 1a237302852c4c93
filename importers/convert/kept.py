"""Imports that are kept: which folder a source's has, believed by content and never by name or time.

A folder's weights are compared with the hashes its import recorded; what that told is remembered for as long as the
files cannot have changed, so that starting again reads nothing.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.integrity import damage_of
from mixtral_recipes.checkpoints.format.manifest import NAME as MANIFEST
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES
from mixtral_recipes.importers.convert.tensor_hashes import holds
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.system.home import models_home
from mixtral_recipes.system.remembered import remember, remembered

_SAME = "same"


def place_of(source: Source, origin: dict[str, Any], dtype: str | None) -> Path:
    """The first folder a source's import may be in: named by what is cheap to know of it.

    Args:
        source: The opened source.
        origin: ``id`` and ``revision`` of the Hub, or ``path``.
        dtype: What its tensors are cast to, as safetensors spells it; None keeps their own.
    """
    suffix = f"-{TORCH_NAMES[dtype]}" if dtype else ""
    if "id" in origin:
        repo = origin["id"].removeprefix("hf://")
        return models_home() / f"{repo}@{origin['revision'][:12]}{suffix}"
    return models_home() / "local" / f"{source.folder.name}@{_small_content(source)}{suffix}"


def find(place: Path, source: Source, origin: dict[str, Any]) -> tuple[Path, bool]:
    """The folder of a source's import, and whether it is there: what is there may be another's of the same name.

    If it is not there, call it again while holding ``place``.

    Raises:
        CheckpointError: a folder there has a damaged manifest.
    """
    for folder in _candidates(place):
        if not (folder / MANIFEST).is_file() or damage_of(folder, hashes=False):
            return folder, False
        if is_of(folder, source, origin):
            return folder, True
    raise AssertionError("there is always another name")


def is_of(folder: Path, source: Source, origin: dict[str, Any]) -> bool:
    """Whether a kept import was made from a source, as it is now."""
    manifest = read_manifest(folder)
    if "id" in origin:  # a commit names its content, and the files of the Hub's cache were compared with it
        return all(manifest["source"].get(name) == origin[name] for name in ("id", "revision"))
    answer = remembered(
        _memos(), source.weights, _question(folder), lambda: _SAME if holds(source, manifest["tensors"]) else "other"
    )
    return answer == _SAME


def note(folder: Path, source: Source, *, since: str | None) -> None:
    """Remember that an import was made from a source, whose `settled_state` before it was read is ``since``."""
    remember(_memos(), source.weights, _question(folder), _SAME, since=since)


def _memos() -> Path:
    return models_home() / ".compared"


def _question(folder: Path) -> str:
    return f"holds {read_manifest(folder)['seal']}"


def _candidates(place: Path) -> Iterator[Path]:
    yield place
    for number in itertools.count(2):
        yield place.with_name(f"{place.name}.{number}")


def _small_content(source: Source) -> str:
    """What a folder says of itself: the bytes of its small files, and its tensors' names, types and shapes."""
    # Not every form has its configuration in a file of its own.
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for path in source.sidecars:
        name = path.relative_to(source.beside or source.folder).as_posix()
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for name, rows in sorted(source.tensors.items()):
        digest.update(f"{name} {rows.dtype} {rows.rows} {rows.row_bytes}".encode())
    return digest.hexdigest()[:12]
