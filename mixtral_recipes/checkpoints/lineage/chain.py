"""A model followed back to its source, every link compared with what was recorded of it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixtral_recipes.checkpoints.format.integrity import damage_of
from mixtral_recipes.checkpoints.format.manifest import NAME as MANIFEST
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage import record as records
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_adapter, hash_of_tensors, identity_of, short
from mixtral_recipes.checkpoints.lineage.links import mismatch
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.errors import CheckpointError

# ok: as recorded. wrong: something else, or damaged. absent: nothing is there. named: a commit names the content.
State = Literal["ok", "wrong", "absent", "named"]
Tensors = dict[str, dict[str, Any]]
# The tensors of a Hugging Face folder or a GGUF file: name -> dtype, shape and, if asked for, sha256; a folder's are
# cast where dtypes are given.
ReadTensors = Callable[[Path, bool, Mapping[str, str] | None], Tensors]


@dataclass(frozen=True)
class Link:
    """One folder of a chain.

    Attributes:
        role: What it is to the one that names it; empty for the folder that was asked about.
        record: What is recorded of it.
        path: Where it is, or was.
        state: How it compares.
        detail: What is wrong, with both identities.
    """

    role: str
    record: Lineage
    path: Path | None
    state: State
    detail: str = ""


@dataclass(frozen=True)
class _Child:
    """The folder that names a parent, and the dtypes of its tensors where it holds them."""

    record: Lineage
    dtypes: Mapping[str, str] | None


@dataclass
class Follower:
    """Follows one model back.

    Attributes:
        read_tensors: Reads a Hugging Face folder.
        hashes: Whether weights are read and hashed; otherwise manifests, small files, sizes, names and shapes are
            compared.
        base: Where adapters' base is now; None takes the place it was at.
        say: Called with each folder before it is read.
    """

    read_tensors: ReadTensors
    hashes: bool = True
    base: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def follow(self, folder: Path) -> list[Link]:
        """Every link from a folder back to its sources, nearest first.

        Raises:
            CheckpointError: the folder itself has no lineage, or a damaged one.
        """
        record = records.of_checkpoint(folder) if (folder / MANIFEST).is_file() else records.read(folder)
        self.say(f"Reading {folder}")
        problem = self._own_problem(folder, record)
        links = [Link("", record, folder, "wrong" if problem else "ok", problem or "")]
        return links + self._parents(folder, record)

    def _parents(self, folder: Path | None, record: Lineage) -> list[Link]:
        """The links above a record; ``folder`` is None where the record is all there is."""
        found: list[Link] = []
        child = _Child(record, _dtypes(folder))
        for parent in record.parents:
            link = self._compare(parent, child)
            there = link.path if link.state == "ok" and link.record.kind != "source" else None
            found += [link, *self._parents(there, link.record)]
        return found

    def _compare(self, parent: Parent, child: _Child) -> Link:
        place = self.base if parent.role == "base" and self.base else Path(parent.path) if parent.path else None
        if place is None or not os.access(place, os.R_OK):  # it may be in the home folder of someone else
            named = parent.record.kind == "source" and "id" in parent.record.origin
            return Link(parent.role, parent.record, place, "named" if named else "absent")
        self.say(f"Reading {place}")
        try:
            problem, record = self._problem(place, parent.record, child)
        except (CheckpointError, OSError) as error:
            problem, record = str(error), parent.record
        if problem:
            return Link(parent.role, parent.record, place, "wrong", problem)
        return Link(parent.role, record, place, "ok")

    def _problem(self, place: Path, recorded: Lineage, child: _Child) -> tuple[str | None, Lineage]:
        """What is wrong with a parent's folder, and the record to go on with."""
        if recorded.kind == "source":
            return self._source_problem(place, recorded, child), recorded
        if recorded.kind == "export":
            own = records.read(place)
            found = own.identity
        else:
            own = records.of_checkpoint(place)
            found = identity_of(place)
        problem = mismatch(recorded.identity, found, tokenizer=True)
        if problem is None and own.digest != recorded.digest:
            problem = (
                f"its {records.NAME} has another history ({short(own.digest)}, not the recorded "
                f"{short(recorded.digest)})"
            )
        # What was recorded is the same history, and knows where a parent was later: a base that moved before a merge.
        return f"{place}: {problem}" if problem else self._own_problem(place, own), recorded

    def _own_problem(self, folder: Path, record: Lineage) -> str | None:
        """What in a folder is not as its own records say."""
        if record.kind == "export":
            problem = self._export_problem(folder, record)
        else:
            damage = damage_of(folder, hashes=self.hashes)
            if damage:
                return damage  # names the file
            problem = mismatch(record.identity, identity_of(folder), tokenizer=True)
        return problem and f"{folder}: {problem}"

    def _export_problem(self, folder: Path, record: Lineage) -> str | None:
        small = mismatch(record.identity, Identity.of(None, folder), tokenizer=True)
        if small:
            return small
        if not record.tensors:
            return self._adapters_problem(folder, record)
        if hash_of_tensors(record.tensors) != record.identity.weights:
            return f"its {records.NAME} contradicts itself about the weights"
        found = self.read_tensors(folder, self.hashes, None)
        if self.hashes:
            return mismatch(record.identity, Identity(hash_of_tensors(found)))
        return _other_shapes(found, record.tensors)

    def _adapters_problem(self, folder: Path, record: Lineage) -> str | None:
        """Exported adapters are known by their files' hash."""
        if not self.hashes:
            return None
        found = hash_of_adapter(folder)
        return mismatch(record.identity, Identity(found)) if found else "it has no adapter weights"

    def _source_problem(self, folder: Path, recorded: Lineage, child: _Child) -> str | None:
        """Compare a model's or an adapter's folder with what was imported from it."""
        small = mismatch(recorded.identity, Identity.of(None, folder), tokenizer=True)
        if small or not self.hashes:
            return small and f"{folder}: {small}"
        adapter = hash_of_adapter(folder)
        if adapter:
            problem = mismatch(recorded.identity, Identity(adapter))
            return problem and f"{folder}: {problem}"
        as_it_is = recorded.identity.weights
        dtypes = None if as_it_is else child.dtypes
        wanted = as_it_is or (child.record.identity.weights if child.dtypes else None)
        found = Identity(hash_of_tensors(self.read_tensors(folder, True, dtypes)))
        problem = mismatch(Identity(wanted), found)
        return problem and f"{folder}: {problem}"


def _dtypes(folder: Path | None) -> dict[str, str] | None:
    """The dtypes of a checkpoint's tensors, where its manifest knows them."""
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    return {name: entry["dtype"] for name, entry in read_manifest(folder)["tensors"].items()} or None


def _other_shapes(found: Tensors, recorded: Mapping[str, Any]) -> str | None:
    names = sorted(found.keys() | recorded.keys())
    for name in names:
        mine, theirs = ({k: t.get(name, {}).get(k) for k in ("dtype", "shape")} for t in (found, recorded))
        if mine != theirs:
            return f"{name} is {mine}, but {theirs} was recorded"
    return None
