"""``lineage.json``: what a folder records of itself, and of everything it was made from, back to the source.

Each record holds its parents' records whole, so that a model can be followed back where its parents are gone. The
folders of a machine are noted where links were followed, and left out of what is published.
"""

import dataclasses
import functools
import json
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage.identity import Identity, identity_of
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import now, write_text
from mixtral_recipes.system.json_files import hash_of, read_object
from mixtral_recipes.system.machine import package_version
from mixtral_recipes.system.schema import typed

NAME = "lineage.json"
_BESIDE = ".lineage.json"  # the ending of an exported file's
FORMAT = "mixtral-recipes/lineage/1"
_DEEPEST = 100


@functools.cache
def code_version() -> str:
    """The package's version; with the commit, and whether files differ from it, where it runs from a repository."""
    root = Path(__file__).resolve().parents[3]
    version = package_version("mixtral-recipes") or "unknown"
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{commit}"


@dataclass(frozen=True)
class Parent:
    """A folder that another was made from.

    Attributes:
        role: ``source`` (files that were imported), ``base`` (what adapters adapt), ``start`` (weights a run began
            with), ``merged`` (adapters that were added up) or ``checkpoint`` (what was exported).
        record: What it recorded of itself.
        path: Where it was; None where that says nothing to a reader.
    """

    role: str
    record: "Lineage"
    path: str | None = None


@dataclass(frozen=True)
class Lineage:
    """What a folder is, and what it was made from.

    Attributes:
        kind: ``source``, ``model`` (an import), ``training``, ``adapter`` or ``export``.
        identity: Its content.
        origin: Of a source: the Hub's ``id`` and ``revision``, or the ``folder``'s name.
        run: Of a run's checkpoint: its name, ``step`` and ``consumed_samples``.
        recipe: Every setting of the run by its dotted path.
        data: Of a run: the data set's recognised ``form`` and ``sha256``.
        tensors: Of an export: name -> hash of each tensor; its folder has no manifest that would hold them.
        files: Of an export: every file in its folder, for the same reason; `write` lists them.
        parents: What it was made from.
        created: When, in UTC.
        code: Version of this package, and the commit where it runs from a repository.
    """

    kind: str
    identity: Identity
    origin: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    parents: tuple[Parent, ...] = ()
    created: str = field(default_factory=now)
    code: str = field(default_factory=code_version)

    def parent(self, role: str) -> Parent | None:
        """The parent of a role, where there is one."""
        return next((parent for parent in self.parents if parent.role == role), None)

    def at(self, role: str, path: Path) -> "Lineage":
        """The record, with the parent of a role at another place."""
        parents = [replace(parent, path=str(path)) if parent.role == role else parent for parent in self.parents]
        return replace(self, parents=tuple(parents))

    @property
    def digest(self) -> str:
        """A hash of the history: content of this folder and of its ancestors, runs, recipes and data.

        The same wherever the folders lie, and when the same content was made again by the same history.
        """
        return hash_of(_history(self))

    def ancestors(self) -> list["Lineage"]:
        """This record and what it was made from, nearest first."""
        found: list[Lineage] = [self]
        for record in found:
            found += [parent.record for parent in record.parents]
        return found


def place_of(path: Path) -> Path:
    """Where the record of a folder, or of an exported file, is: in it, or beside it with its name."""
    return path.with_suffix(_BESIDE) if path.is_file() else path / NAME


def write(folder: Path, record: Lineage, *, paths: bool = True) -> None:
    """Write a folder's ``lineage.json``, or the one beside an exported file; an export's is its last file.

    Args:
        folder: The folder, or its staging folder; or the file.
        record: What to write.
        paths: Whether the folders of parents are named, which publishing leaves out.
    """
    if record.kind == "export" and not record.files:
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        record = replace(record, files=tuple(sorted(there | {NAME})))
    plain = _plain(record, paths=paths) | {"seal": _seal(record)}
    write_text(place_of(folder), json.dumps(plain, indent=1) + "\n")


def read(folder: Path) -> Lineage:
    """What a folder, or an exported file, records of itself.

    Raises:
        CheckpointError: it has no ``lineage.json``, or a damaged one.
    """
    path = place_of(folder)
    if not path.is_file():
        what = f"has no {path.name}" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}, so its origin is unknown.")
    return _read(path)


def read_file(path: Path) -> Lineage | None:
    """A record by its own place, such as one beside an exported file that is gone; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    return _read(path) if path.is_file() else None


def _read(path: Path) -> Lineage:
    try:
        # A record stands in a list, in a parent, in a record.
        plain = read_object(path, CheckpointError, deepest=3 * _DEEPEST + 10, finite=False)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if plain.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: format {plain['format']!r} is not supported; the only supported format is {FORMAT!r}."
        )
    record = typed(plain, Lineage, f"{path}: damaged, or not a lineage", CheckpointError)
    if _depth(record) > _DEEPEST:
        raise CheckpointError(f"{path}: nested more than {_DEEPEST} records deep.")
    if plain.get("seal") != _seal(record):
        raise CheckpointError(f"{path}: was changed by hand: its seal (a hash of the rest of the file) does not match.")
    return record


def read_or_none(folder: Path) -> Lineage | None:
    """As `read`; None where there is no ``lineage.json``."""
    return read(folder) if place_of(folder).is_file() else None


def of_checkpoint(folder: Path) -> Lineage:
    """What a checkpoint of ours records of itself, or where it recorded nothing, what its manifest says."""
    found = read_or_none(folder)
    if found is None:
        manifest = read_manifest(folder)
        return Lineage(manifest["kind"], identity_of(folder), created=manifest["created"], code="unknown")
    return found


def _seal(record: Lineage) -> str:
    return hash_of(_plain(record, paths=False))


def _history(record: Lineage) -> list[Any]:
    origin = {name: value for name, value in record.origin.items() if name != "folder"}
    parents = [[parent.role, _history(parent.record)] for parent in record.parents]
    return [record.kind, dataclasses.asdict(record.identity), origin, record.run, record.recipe, record.data, parents]


def _depth(record: Lineage) -> int:
    return 1 + max((_depth(parent.record) for parent in record.parents), default=0)


def _plain(record: Lineage, *, paths: bool) -> dict[str, Any]:
    fields = {"format": FORMAT, "kind": record.kind, "created": record.created, "code": record.code}
    told = {name: getattr(record, name) for name in ("origin", "run", "data", "recipe", "tensors")}
    parents = [
        {"role": parent.role}
        | ({"path": parent.path} if paths and parent.path else {})
        # An export's tensors are hashed into its identity: what is made from it need not name them all.
        | {"record": _plain(replace(parent.record, tensors={}, files=()), paths=paths)}
        for parent in record.parents
    ]
    return (
        fields
        | {"identity": dataclasses.asdict(record.identity)}
        | {name: value for name, value in told.items() if value}
        | ({"files": list(record.files)} if record.files else {})
        | {"parents": parents}
    )
