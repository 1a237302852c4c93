"""Where a data set comes from: a file, a folder with a file per split, or the Hugging Face Hub."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixtral_recipes.data.cache import content_hash, sampled_hash
from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.folders import are_one_set, by_split, files_in, names_of_data
from mixtral_recipes.data.records.json_stream import json_splits
from mixtral_recipes.data.records.parse import SUFFIXES, read_records
from mixtral_recipes.data.records.record import SPLIT_NAMES, SPLITS, Record, to_judge_on
from mixtral_recipes.data.records.text_parts import PLAIN_TEXT
from mixtral_recipes.embedded import PREFIX, resolve
from mixtral_recipes.errors import DataError, in_short
from mixtral_recipes.system.hub_ids import close_to, refuse_misspelt_path, warn_of_a_word
from mixtral_recipes.system.pointers import refuse_pointer

_HUB_ID = re.compile(r"(?:hf://)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """The splits of a data set.

    Attributes:
        spec: What the user named.
        files: Files of each split; empty for the Hub.
        hub: Splits of a Hub data set, as `datasets` gave them.
        names_inside: The splits' own names, where one JSON file holds several.
        streaming: Whether it is read as it comes, and never all of it before a run starts.
        unread: Names of data files, or of splits on the Hub, that are of none of these splits.
    """

    spec: str
    files: dict[str, list[Path]] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    names_inside: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in (path for paths in self.files.values() for path in paths):
            refuse_pointer(path, DataError)

    @property
    def splits(self) -> list[str]:
        """Names of the splits that are there, the one to train on first."""
        return [name for name in SPLITS if name in (self.files or self.hub)]

    def to_judge_on(self) -> "Source":
        """It, for a model not trained on it: its validation split is what `record.to_judge_on` says."""
        split = to_judge_on(self.splits)
        if split == "validation":
            return self
        parts = ({"validation": part[split]} if part else {} for part in (self.files, self.hub, self.names_inside))
        return replace(self, **dict(zip(("files", "hub", "names_inside"), parts, strict=True)))

    def records(self, split: str, bad: BadRecord = stop) -> Iterator[Record]:
        """The records of a split.

        Args:
            split: ``train``, ``validation`` or ``test``.
            bad: As in `read_records`.
        """
        if self.hub:
            for number, row in enumerate(self.hub[split]):
                yield Record(row, f"{self.spec}:{split}[{number}]")
            return
        for path in self.files[split]:
            yield from read_records(path, bad, self.names_inside.get(split))

    def identity(self) -> dict[str, Any]:
        """What the content depends on, for the cache."""
        if self.hub:
            return {split: getattr(rows, "_fingerprint", None) for split, rows in self.hub.items()}
        look = sampled_hash if self.streaming else content_hash
        return {split: [look(path) for path in paths] for split, paths in self.files.items()}


def open_source(spec: str | Path | None, *, streaming: bool = False) -> Source:
    """Find the splits of a data set.

    Args:
        spec: A file; a folder; ``org/name``, ``org/name:config`` or ``org/name@revision`` of the Hub; ``embedded://``.
        streaming: Whether it is read as it comes; one of the Hub is then not downloaded first.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    found = check_place(spec)
    if found is not None:
        return replace(found, streaming=streaming)
    named = _HUB_ID.fullmatch(str(spec))
    assert named is not None  # `check_place` has seen to that
    return _on_the_hub(str(spec), *named.groups(), streaming=streaming)


def check_place(spec: str | Path | None) -> Source | None:
    """The splits of a data set that is on this machine; None for one of the Hub, which is not asked.

    Args:
        spec: As for `open_source`.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    if spec is None:
        raise DataError("data.dataset_root is not set; set it to a file, a folder or a Hub id (--data X).")
    path = resolve(spec).expanduser() if not str(spec).startswith("hf://") else None
    if path is not None and path.is_file():
        return _file_splits(str(spec), path)
    if path is not None and path.is_dir():
        return _folder_splits(str(spec), path)
    named = _HUB_ID.fullmatch(str(spec))
    looks_like_path = path is not None and (str(spec).startswith((".", "/", "~")) or suffix_of(path) in SUFFIXES)
    if named is None or looks_like_path:
        raise DataError(f"{spec}: no such file or folder, and not a Hub id (org/name).{close_to(str(spec))}")
    refuse_misspelt_path(str(spec), "dataset", DataError)
    return None


def check_named(spec: str | Path | None) -> None:
    """As `check_place`, which also warns of a word that is taken for a Hub id."""
    found = check_place(spec)
    if found is None:
        warn_of_a_word(str(spec), "dataset", ("embedded://squad",))
    else:
        check_trains(spec, found.splits)


def check_trains(spec: object, splits: Collection[str]) -> None:
    """Refuse a data set that is to be trained on and has other splits only."""
    if "train" not in splits:
        raise DataError(f"{spec}: no training split ({' or '.join(SPLITS['train'])}); it has {', '.join(splits)}.")


def _file_splits(spec: str, path: Path) -> Source:
    """A file is the training split, unless it is JSON that holds several."""
    found = json_splits(path) if suffix_of(path) == ".json" else []
    if not found:
        return Source(spec, {"train": [path]})
    inside = {SPLIT_NAMES[name.lower()]: name for name in found}
    return Source(spec, {name: [path] for name in inside}, names_inside=inside)


def _folder_splits(spec: str, folder: Path) -> Source:
    """``train.jsonl``, ``train-00000-of-00002.parquet``, ``train/*.parquet``; or a single set, whatever its name."""
    found = by_split(folder, files_in(folder, SUFFIXES))
    unnamed = found.pop("", [])
    if not found and are_one_set(unnamed):
        found, unnamed = {"train": unnamed}, []
    if not found:
        names = ", ".join(path.name for path in unnamed[:5])
        what = f"found {names}" if names else f"no file name ends in {', '.join(SUFFIXES)}"
        raise DataError(
            f"{folder}: no training split ({' or '.join(SPLITS['train'])} with one of its endings); {what}."
        )
    others = names_of_data((*unnamed, *files_in(folder, PLAIN_TEXT)))
    return Source(spec, found, unread=others if not spec.startswith(PREFIX) else ())  # what ships here is complete


def _on_the_hub(spec: str, repo: str, config: str | None, revision: str | None, *, streaming: bool) -> Source:
    import datasets

    try:
        more: dict[str, Any] = {"streaming": True} if streaming else {}
        loaded = datasets.load_dataset(repo, config, revision=revision, **more)
    except Exception as error:  # datasets raises its own, requests', and Python's
        raise DataError(
            f"{spec}: not a file, and cannot be read from the Hub ({type(error).__name__}: {in_short(error)}); check "
            f"the name and the network, or pass a local file with --data PATH.{close_to(spec, ('squad',))}"
        ) from error
    spelled = [(name, s) for name, some in SPLITS.items() for s in (f"{name}_sft", *some)]
    named = {name: s for name, s in spelled if s in loaded}
    if not named:
        check_trains(spec, list(map(str, loaded)))
    unread = tuple(str(s) for s in loaded if s not in named.values())
    return Source(spec, hub={name: loaded[s] for name, s in named.items()}, streaming=streaming, unread=unread)
