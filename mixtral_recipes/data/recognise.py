"""Find out what a data set is, once, and say so before anything runs."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.data.corpus_paths import HUB, corpus_at, folder_files
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.open import Source, open_source
from mixtral_recipes.data.records.parse import SUFFIXES
from mixtral_recipes.data.records.text_parts import PLAIN_TEXT
from mixtral_recipes.embedded import PREFIX, resolve
from mixtral_recipes.errors import DataError

# Names people give to prompts and answers, most telling first.
PAIR_COLUMNS = (
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("source", "target"),
)
_LOOKED_AT = 20


@dataclass(frozen=True)
class Recognized:
    """What a data set was recognised as.

    Attributes:
        module_class: The data module that reads it.
        kwargs: Arguments that make that module read it.
        description: One line for the user.
        kind: ``squad``, ``chat``, ``pairs``, ``text`` or ``corpus``.
    """

    module_class: type
    kwargs: dict[str, Any]
    description: str
    kind: str
    source: Source | None = field(default=None, repr=False)


def recognize(spec: str | Path) -> Recognized:
    """Find out what a data set is.

    Args:
        spec: ``squad``; a file; a folder; a Hub id; an indexed corpus (its path with or without ``.bin``).

    Raises:
        DataError: it is not there, or its records are of no known form.
    """
    text = str(spec)
    if text in ("squad", "rajpurkar/squad"):
        from mixtral_recipes.data.modules.squad import SquadDataModule

        return Recognized(SquadDataModule, {"dataset_root": None}, "rajpurkar/squad on the Hub: SQuAD", "squad")
    path = resolve(spec).expanduser()
    if corpus_at(path) is not None:
        return _pretraining(spec, "an indexed corpus (.bin and .idx)", "corpus", None)
    if path.is_file() and suffix_of(path) in PLAIN_TEXT:
        return _pretraining(spec, "plain text, documents between blank lines", "text", None)
    return _in_folder(spec, path) if path.is_dir() else _by_records(spec, open_source(spec))


def _in_folder(spec: str | Path, folder: Path) -> Recognized:
    """A folder of corpora or of plain text, of documents in any number of files, or of records by split."""
    files = folder_files(folder)
    every = [file for some in files.values() for file in some]
    size = f"{len(every)} file(s), splits {', '.join(files)}"
    if every[0].suffix == ".idx":
        return _pretraining(spec, f"indexed corpora (.bin and .idx), {size}", "corpus", None)
    if all(suffix_of(file) in PLAIN_TEXT for file in every):
        return _pretraining(spec, f"plain text, documents between blank lines, {size}", "text", None)
    try:
        return _by_records(spec, open_source(spec))
    except DataError:
        # Only documents need no file named after a split.
        found = _by_records(spec, Source(str(spec), files, {}))
        if found.kind != "text":
            raise
        return found


def _by_records(spec: str | Path, source: Source) -> Recognized:
    errors: list[DataError] = []

    def bad(error: DataError, record: Any = None) -> None:
        errors.append(error)

    records = [r.value for r in itertools.islice(source.records("train", bad), _LOOKED_AT)]
    if not records:
        raise errors[0] if errors else DataError(f"{spec}: no records.")
    counts = Counter(name for record in records for name in record)
    names = [name for name, count in counts.items() if 2 * count > len(records)]  # a few bad records change nothing
    root = _stable(spec)
    size = f"splits {', '.join(source.splits)}" if len(source.splits) > 1 else "one split"
    if {"context", "question", "answers"} <= set(names) or "paragraphs" in names:
        from mixtral_recipes.data.modules.squad import SquadDataModule

        return Recognized(SquadDataModule, {"dataset_root": root}, f"{spec}: SQuAD, {size}", "squad", source)
    typical = next(record for record in records if set(names) <= set(record))
    shape = _chat_shape(typical, names)
    if shape:
        from mixtral_recipes.data.modules.chat import ChatDataModule

        told = f"{spec}: conversations ({shape}), {size}, loss on the assistant's turns"
        return Recognized(ChatDataModule, {"dataset_root": root}, told, "chat", source)
    for prompt, answer in PAIR_COLUMNS:
        if prompt in names and answer in names:
            from mixtral_recipes.data.modules.finetuning import FineTuningDataModule

            columns = {k: v for k, v in (("input", prompt), ("output", answer)) if k != v}
            kwargs: dict[str, Any] = {"dataset_root": root} | ({"columns": columns} if columns else {})
            told = f"{spec}: prompts and answers ({prompt} -> {answer}), {size}, loss on the answer"
            return Recognized(FineTuningDataModule, kwargs, told, "pairs", source)
    if "text" in names and isinstance(typical["text"], str):
        return _pretraining(spec, f"documents (text), {size}, loss on every token", "text", source)
    known = "; ".join(
        ("context, question, answers", "messages", "conversations", "instruction, output", "input, output")
    )
    raise DataError(
        f"{spec}: records have {', '.join(names) or 'no field in common'}, which is no known form ({known}); name the "
        "fields with FineTuningDataModule's columns={'input': ..., 'output': ...}."
    )


def _chat_shape(record: dict[str, Any], names: list[str]) -> str | None:
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if "instruction" in names and "output" in names:
        return "alpaca"
    if isinstance(record.get("prompt"), list) and "completion" in names:
        return "prompt and completion messages"
    return None


def _pretraining(spec: str | Path, what: str, kind: str, source: Source | None) -> Recognized:
    from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule

    on_hub = source is not None and bool(source.hub) and not str(spec).startswith(HUB)
    kwargs = {"paths": [f"{HUB}{spec}" if on_hub else _stable(spec)], "split": "95,5,0"}
    return Recognized(PreTrainingDataModule, kwargs, f"{spec}: {what}", kind, source)


def _stable(spec: str | Path) -> str:
    """A path that means the same from any folder; Hub ids and package data as they are."""
    text = str(spec)
    if text.startswith((PREFIX, "hf://")):
        return text
    path = Path(text).expanduser()
    there = path.exists() or path.with_name(path.name + ".idx").exists() or path.suffix in (*SUFFIXES, ".bin")
    return str(path.absolute()) if there else text
