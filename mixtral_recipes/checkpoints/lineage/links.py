"""Compares a link between two folders with what is there, before any reader trusts its path."""

import os
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.lineage.identity import Identity, identity_of
from mixtral_recipes.checkpoints.lineage.record import NAME, Lineage, Parent, read, read_or_none
from mixtral_recipes.errors import CheckpointError

# Where a command has no --base.
BASE_ELSEWHERE = "--base PATH of `mixtral-recipes export` (the exported folder needs no base)"


def base_of(adapter: Path, base: Path | None = None, *, place_option: str = "--base PATH") -> Path:
    """The checkpoint that adapters adapt, compared by content with the one they were trained on.

    Args:
        adapter: An adapter checkpoint.
        base: Where its base is now; None takes the place it was at.
        place_option: How that is given, for messages.

    Raises:
        CheckpointError: it is not there, or something else is; the message names both identities.
    """
    parent = read(adapter).parent("base")
    if parent is None:
        raise CheckpointError(f"{adapter}: its lineage does not name the base model of the adapters.")
    place = base or Path(parent.path or "")
    if not os.access(place / "manifest.json", os.R_OK):
        wanted = parent.record.identity
        raise CheckpointError(
            f"{adapter}: its base model ({wanted.told('weights')}) is not at {place}, or cannot be read; pass its new "
            f"location with {place_option}, or import it again."
        )
    problem = mismatch(parent.record.identity, identity_of(place))
    if problem:
        raise CheckpointError(
            f"{place} is not the base of {adapter}: {problem}; pass the right one with {place_option}."
        )
    return place


def source_parent(folder: Path, origin: dict[str, Any], weights: str | None) -> Parent:
    """The parent of an import.

    Args:
        folder: The files that were imported; an export of ours brings its own lineage.
        origin: ``id`` and ``revision`` of the Hub, or ``path``.
        weights: The identity of the weights that were read; None where they were cast on the way.

    Raises:
        CheckpointError: the folder's lineage is damaged, or of other weights.
    """
    path = origin.get("path")
    found = Identity.of(weights, folder)
    own = read_or_none(folder)
    if own is None:
        told = {key: value for key, value in origin.items() if key != "path"} or {"folder": folder.name}
        return Parent("source", Lineage("source", found, origin=told), path)
    problem = mismatch(own.identity, found, tokenizer=True)
    if problem:
        raise CheckpointError(
            f"{folder}: does not match its {NAME}: {problem}; delete that file to import the folder as a new source."
        )
    return Parent("source", own, path)


def mismatch(recorded: Identity, found: Identity, *, tokenizer: bool = False) -> str | None:
    """What differs between what a link recorded and what is there, with both identities; None where nothing does.

    Args:
        recorded: What the link says.
        found: What is there.
        tokenizer: Whether the tokenizer counts, and whether small files may be missing; merging and loading weights do
            not depend on them.
    """
    names = [name for name in recorded.differences(found) if tokenizer or name != "tokenizer"]
    if tokenizer:
        names += [name for name in ("config", "tokenizer") if getattr(recorded, name) and not getattr(found, name)]
    if not names:
        return None
    return f"it has {found.told(*names)}, but {recorded.told(*names)} was recorded"
