"""Find out what a data set is, once, and say so before anything runs."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.data.corpus_paths import HUB, corpus_at, folder_files
from mixtral_recipes.data.records.conversations import renamed
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.folders import told_apart
from mixtral_recipes.data.records.forms import (
    BESIDE_A_PROMPT,
    Form,
    column_of_turns,
    form_of,
    how_to_rewrite,
    pair_names,
    rival_pairs,
)
from mixtral_recipes.data.records.open import Source, open_source
from mixtral_recipes.data.records.parse import SUFFIXES
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.data.records.squad import questions_of
from mixtral_recipes.data.records.text_parts import PLAIN_TEXT
from mixtral_recipes.embedded import PREFIX, resolve
from mixtral_recipes.errors import DataError

_LOOKED_AT = 20
_SHARE = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_PREFERENCE = (
    "preference pairs (an answer that was chosen and one that was rejected, or answers with a label); learning from "
    "them takes a preference loss (DPO, KTO), which these recipes do not have. To fine-tune on the chosen answers, "
    "write them to a file with `messages`, or with `input` and `output`, and nothing of the others."
)

_MESSAGES = (
    "each record is one message of a conversation (it has a role and a text); put the messages of each conversation, "
    "in order, into the `messages` of one record."
)
_BESIDE = ("system", "system_prompt", "tools", "functions")


@dataclass(frozen=True)
class Recognized:
    """What a data set was recognised as.

    Attributes:
        module_class: The data module that reads it.
        kwargs: Arguments that make that module read it.
        description: One line for the user.
        kind: ``squad``, ``chat``, ``pairs``, ``text`` or ``corpus``.
        source: Its splits, where it is made of records.
        files: Its files by split, where it is plain text.
    """

    module_class: type
    kwargs: dict[str, Any]
    description: str
    kind: str
    source: Source | None = field(default=None, repr=False)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict, repr=False)

    def module(self, **settings: Any) -> Any:
        """Its data module, with further settings."""
        return self.module_class(**{**self.kwargs, **settings})


def recognize(spec: str | Path, columns: Mapping[str, str | None] | None = None) -> Recognized:
    """Find out what a data set is.

    Args:
        spec: ``squad``; a file; a folder; a Hub id; an indexed corpus (its path with or without ``.bin``).
        columns: Names used here -> names in the records, e.g. ``{"input": "dialogue", "output": "summary"}``,
            ``{"messages": "talk"}``, ``{"text": "content"}``; None leaves a field unread.

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
        return _pretraining(spec, "plain text, documents between blank lines", "text", None, {"train": [path]})
    if path.is_dir():
        return _in_folder(spec, path, columns or {})
    return _by_records(spec, open_source(spec), columns or {})


def shares(specs: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Data sets and their shares, from ``a.jsonl:0.7``; no shares where none is written.

    Raises:
        DataError: some have a share and others have not, or a share is 0.
    """
    found: list[tuple[str, float | None]] = []
    for spec in specs:
        named = _SHARE.fullmatch(spec)
        if named is None or ("://" not in spec and resolve(spec).exists()):  # a file may be called so
            found.append((spec, None))
        elif float(named[2]) > 0:
            found.append((named[1], float(named[2])))
        else:
            raise DataError(f"{spec}: a share must be more than 0.")
    weights = [weight for _, weight in found if weight is not None]
    if weights and len(weights) < len(found):
        without = next(name for name, weight in found if weight is None)
        raise DataError(f"{without}: has no share, and others have; write {without}:0.5, or no share at all.")
    return [name for name, _ in found], weights or None


def _in_folder(spec: str | Path, folder: Path, columns: Mapping[str, str | None]) -> Recognized:
    """A folder of corpora or of plain text, of documents in any number of files, or of records by split."""
    files = folder_files(folder)
    every = [file for some in files.values() for file in some]
    size = f"{len(every)} file(s), splits {', '.join(files)}"
    if every[0].suffix == ".idx":
        return _pretraining(spec, f"indexed corpora (.bin and .idx), {size}", "corpus", None)
    if all(suffix_of(file) in PLAIN_TEXT for file in every):
        return _pretraining(spec, f"plain text, documents between blank lines, {size}", "text", None, files)
    try:
        return _by_records(spec, open_source(spec), columns)
    except DataError:
        # Only documents need no file named after a split.
        found = _by_records(spec, Source(str(spec), files, {}), columns)
        if found.kind != "text":
            raise
        return found


def _by_records(spec: str | Path, source: Source, columns: Mapping[str, str | None]) -> Recognized:
    errors: list[DataError] = []

    def bad(error: DataError, record: Any = None) -> None:
        errors.append(error)

    records = [renamed(r.value, columns)[0] for r in itertools.islice(source.records("train", bad), _LOOKED_AT)]
    if not records:
        raise errors[0] if errors else DataError(f"{spec}: no records.")
    root = _stable(spec)
    size = f"splits {', '.join(source.splits)}" if len(source.splits) > 1 else "one split"
    if len(folders := sorted({file.parent.name for file in source.files.get("train", ())})) > 1:
        more = ", ..." if len(folders) > 3 else ""
        size += f" (from {len(folders)} folders together: {', '.join(folders[:3])}{more})"
    if unread := told_apart(source.unread):
        size += f" (in no split, so not read: {unread})"
    # A few records of another form, or bad ones, change nothing.
    form, count = Counter(map(form_of, records)).most_common(1)[0]
    field_of_turns: str | None = None
    if form is None or 2 * count < len(records):
        field_of_turns = column_of_turns(records)
        if field_of_turns is None:
            raise DataError(f"{spec}: {_unknown(records)}")
        form = Form.messages
    if form is Form.preference:
        raise DataError(f"{spec}: {_PREFERENCE}")
    if form is Form.message:
        raise DataError(f"{spec}: {_MESSAGES}")
    if form is Form.squad:
        from mixtral_recipes.data.modules.squad import NO_ANSWER, SquadDataModule

        told = f"{spec}: SQuAD, {size}"
        if any(not q.answers for value in records for q, _ in questions_of(Record(value, str(spec)), bad)):
            told += f", unanswerable questions are learned as {NO_ANSWER!r} unless data.no_answer says otherwise"
        return Recognized(SquadDataModule, {"dataset_root": root}, told, "squad", source)
    if form is Form.text:
        others = [name for name in _fields(records) if name != "text"]
        not_read = f"; not read: {', '.join(others)}" if others else ""
        return _pretraining(
            spec,
            f"documents ({columns.get('text') or 'text'}), {size}, loss on every token{not_read}",
            "text",
            source,
            text_key=columns.get("text"),
        )
    if form is Form.pairs and not columns and (rivals := rival_pairs(records)):
        raise DataError(
            f"{spec}: records have several pairs of a prompt and an answer ({', '.join(map(' -> '.join, rivals))}); "
            f"name the one that is meant: data.columns={{'input': '{rivals[0][0]}', 'output': '{rivals[0][1]}'}}."
        )
    pairs = Counter(pair for record in records if (pair := pair_names(record)))
    pair = pairs.most_common(1)[0][0] if pairs else ("input", "output")
    wanted = [name for name in (*_BESIDE, *BESIDE_A_PROMPT) if name not in pair]
    beside = any(record.get(name) for record in records for name in wanted)
    if form is Form.pairs and not beside and columns.keys() <= {"input", "output"}:
        from mixtral_recipes.data.modules.finetuning import FineTuningDataModule

        prompt, answer = (columns.get(name) or name for name in pair)
        named = {k: v for k, v in (("input", prompt), ("output", answer)) if k != v}
        kwargs: dict[str, Any] = {"dataset_root": root} | ({"columns": named} if named else {})
        told = f"{spec}: prompts and answers ({prompt} -> {answer}), {size}, loss on the answer"
        return Recognized(FineTuningDataModule, kwargs, told, "pairs", source)
    from mixtral_recipes.data.modules.chat import ChatDataModule

    learned = "the completion only" if form is Form.prompt_completion else "all of the assistant's turns"
    told = (
        f"{spec}: conversations ({field_of_turns or form}), {size}, loss on {learned} unless data.learn says otherwise"
    )
    named = dict(columns) | ({"messages": field_of_turns} if field_of_turns else {})
    kwargs = {"dataset_root": root} | ({"columns": named} if named else {})
    return Recognized(ChatDataModule, kwargs, told, "chat", source)


def _fields(records: list[dict[str, Any]]) -> list[str]:
    """The fields that most records have."""
    counts = Counter(str(name) for record in records for name, value in record.items() if value is not None)
    return [name for name, count in counts.items() if 2 * count >= len(records)]


def _unknown(records: list[dict[str, Any]]) -> str:
    fields = _fields(records)
    if told := how_to_rewrite(fields):
        return f"records have {', '.join(fields)}, which is the form of {told}."
    known = "; ".join(
        ("context, question, answers", "messages", "conversations", "instruction, output", "input, output", "text")
    )
    return (
        f"records have {', '.join(fields) or 'no field in common'}, which is no known form ({known}); "
        "name the prompt and the answer with data.columns={'input': ..., 'output': ...}, or documents with "
        "data.text_key=..."
    )


def _pretraining(
    spec: str | Path,
    what: str,
    kind: str,
    source: Source | None,
    files: Mapping[str, Sequence[Path]] | None = None,
    text_key: str | None = None,
) -> Recognized:
    from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule

    on_hub = source is not None and bool(source.hub) and not str(spec).startswith(HUB)
    kwargs: dict[str, Any] = {"paths": [f"{HUB}{spec}" if on_hub else _stable(spec)], "split": "95,5,0"}
    kwargs |= {"text_key": text_key} if text_key else {}
    return Recognized(PreTrainingDataModule, kwargs, f"{spec}: {what}", kind, source, files or {})


def _stable(spec: str | Path) -> str:
    """A path that means the same from any folder; Hub ids and package data as they are."""
    text = str(spec)
    if text.startswith((PREFIX, "hf://")):
        return text
    path = Path(text).expanduser()
    there = path.exists() or path.with_name(path.name + ".idx").exists() or path.suffix in (*SUFFIXES, ".bin")
    return str(path.absolute()) if there else text
