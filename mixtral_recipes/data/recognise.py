"""Find out what a data set is, once, and say so before anything runs."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.data.corpus_paths import HUB, corpus_at, folder_files
from mixtral_recipes.data.records.bad_records import passed_over
from mixtral_recipes.data.records.conversations import renamed
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.folders import files_in, names_of_data
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
from mixtral_recipes.data.records.record import Record, may_hold
from mixtral_recipes.data.records.squad import questions_of
from mixtral_recipes.data.records.text_parts import PLAIN_TEXT, TEXT_SUFFIXES
from mixtral_recipes.embedded import PREFIX, resolve
from mixtral_recipes.errors import DataError, some_of

_LOOKED_AT = 20
_SHARE = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_PREFERENCE = (
    "preference pairs (a chosen and a rejected answer, or answers with a label); training on them needs a preference "
    "loss (DPO, KTO), which mixtral-recipes does not have. To fine-tune on the chosen answers, write only those to a "
    "file with `messages`, or with `input` and `output`."
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
        columns: Names used by this class -> names in the records, e.g. ``{"input": "dialogue", "output": "summary"}``,
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
        raise DataError(f"{without}: has no share, but others do; use {without}:0.5, or no shares at all.")
    return [name for name, _ in found], weights or None


def _in_folder(spec: str | Path, folder: Path, columns: Mapping[str, str | None]) -> Recognized:
    """A folder of corpora or of plain text, of documents in any number of files, or of records by split."""
    files = folder_files(folder)
    every = [file for some in files.values() for file in some]
    read = set(every)
    unread = names_of_data([file for file in files_in(folder, (".idx", *TEXT_SUFFIXES)) if file not in read])
    size = f"{len(every)} file(s), splits {', '.join(files)}" + (f"; not read: {some_of(unread, 3)}" if unread else "")
    if every[0].suffix == ".idx":
        return _pretraining(spec, f"indexed corpora (.bin and .idx), {size}", "corpus", None)
    plain = [file for file in every if suffix_of(file) in PLAIN_TEXT]
    if len(plain) == len(every):
        return _pretraining(spec, f"plain text, documents between blank lines, {size}", "text", None, files)
    try:
        found = _by_records(spec, open_source(spec), columns)
    except DataError:
        # Only documents need no file named after a split.
        records = {split: [file for file in some if file not in plain] for split, some in files.items()}
        if not records.get("train"):
            raise
        found = _by_records(spec, Source(str(spec), records, {}), columns)
        if found.kind != "text":
            raise
    if found.kind == "text" and plain:
        raise DataError(
            f"{spec}: has documents in records and in plain text ({some_of([file.name for file in plain], 3)}); put "
            "each kind into its own folder, and pass both (--data A --data B)."
        )
    return found


def _by_records(spec: str | Path, source: Source, columns: Mapping[str, str | None]) -> Recognized:
    looked = _Looked.at(spec, source, columns)
    match looked.form:
        case Form.squad:
            return _squad(looked)
        case Form.text:
            return _documents(looked)
        case Form.pairs if looked.only_pairs:
            return _pairs(looked)
        case _:
            return _conversations(looked)


@dataclass(frozen=True)
class _Looked:
    """A source's first records, with the columns under the names used here.

    Attributes:
        spec: The source as it was named.
        source: Its splits.
        columns: Names used by this class -> names in the records.
        records: The records.
        form: That of most of them: a few of another form, or bad ones, change nothing.
        turns: The field that holds the turns, where it has a name of its own.
    """

    spec: str | Path
    source: Source
    columns: Mapping[str, str | None]
    records: list[dict[str, Any]]
    form: Form
    turns: str | None = None

    @classmethod
    def at(cls, spec: str | Path, source: Source, columns: Mapping[str, str | None]) -> "_Looked":
        """Raises DataError if there are no records, or if nothing is learned from their form."""
        errors: list[DataError] = []
        found = source.records(source.splits[0], lambda error, record=None: errors.append(error))
        records = [renamed(record.value, columns)[0] for record in itertools.islice(found, _LOOKED_AT)]
        if not records:
            raise errors[0] if errors else DataError(f"{spec}: no records.")
        form, count = Counter(map(form_of, records)).most_common(1)[0]
        turns = None
        if form is None or 2 * count < len(records):
            form, turns = Form.messages, column_of_turns(records)
            if turns is None:
                raise DataError(f"{spec}: {_unknown(records)}")
        if form is Form.preference:
            raise DataError(f"{spec}: {_PREFERENCE}")
        if form is Form.message:
            raise DataError(f"{spec}: {_MESSAGES}")
        return cls(spec, source, columns, records, form, turns)

    @property
    def size(self) -> str:
        """Its splits, the folders they are made of, and what is in none of them."""
        splits = self.source.splits
        size = f"splits {', '.join(splits)}" if len(splits) > 1 else "one split"
        if len(folders := sorted({file.parent.name for file in self.source.files.get("train", ())})) > 1:
            more = ", ..." if len(folders) > 3 else ""
            size += f" (from {len(folders)} folders together: {', '.join(folders[:3])}{more})"
        if self.source.unread:
            size += f" (not in any split, so not read: {some_of(self.source.unread, 3)})"
        return size

    @property
    def pair(self) -> tuple[str, str]:
        """The fields of the prompt and the answer that most records have."""
        pairs = Counter(pair for record in self.records if (pair := pair_names(record)))
        return pairs.most_common(1)[0][0] if pairs else ("input", "output")

    @property
    def only_pairs(self) -> bool:
        """Whether there is nothing beside a prompt and an answer, and no doubt about which they are.

        Raises:
            DataError: records have several pairs, and none is named.
        """
        if not self.columns and (rivals := rival_pairs(self.records)):
            told = ", ".join(map(" -> ".join, rivals))
            raise DataError(
                f"{self.spec}: records have several pairs of a prompt and an answer ({told}); choose one, for example "
                f"data.columns={{'input': '{rivals[0][0]}', 'output': '{rivals[0][1]}'}}."
            )
        beside = [name for name in (*_BESIDE, *BESIDE_A_PROMPT) if name not in self.pair]
        alone = not any(record.get(name) for record in self.records for name in beside)
        return alone and self.columns.keys() <= {"input", "output"}

    def as_module(self, module_class: type, what: str, kind: str, columns: Mapping[str, str | None]) -> Recognized:
        """It, read by a module that takes a file or folder and names of columns."""
        kwargs: dict[str, Any] = {"dataset_root": _stable(self.spec)} | ({"columns": dict(columns)} if columns else {})
        return Recognized(module_class, kwargs, f"{self.spec}: {what}", kind, self.source)


def _squad(looked: _Looked) -> Recognized:
    from mixtral_recipes.data.modules.squad import NO_ANSWER, SquadDataModule

    told = f"SQuAD, {looked.size}"
    records = [Record(value, str(looked.spec)) for value in looked.records]
    if any(not question.answers for record in records for question, _ in questions_of(record, passed_over)):
        told += f", unanswerable questions are learned as {NO_ANSWER!r} unless data.no_answer is set"
    return looked.as_module(SquadDataModule, told, "squad", {})


def _documents(looked: _Looked) -> Recognized:
    others = [name for name in _fields(looked.records) if name != "text"]
    not_read = f"; not read: {', '.join(others)}" if others else ""
    text_key = looked.columns.get("text")
    told = f"documents ({text_key or 'text'}), {looked.size}, loss on every token{not_read}"
    return _pretraining(looked.spec, told, "text", looked.source, text_key=text_key)


def _pairs(looked: _Looked) -> Recognized:
    from mixtral_recipes.data.modules.finetuning import FineTuningDataModule

    prompt, answer = (looked.columns.get(name) or name for name in looked.pair)
    columns = {name: column for name, column in (("input", prompt), ("output", answer)) if name != column}
    told = f"prompts and answers ({prompt} -> {answer}), {looked.size}, loss on the answer"
    return looked.as_module(FineTuningDataModule, told, "pairs", columns)


def _conversations(looked: _Looked) -> Recognized:
    from mixtral_recipes.data.modules.chat import ChatDataModule

    learned = "the completion only" if looked.form is Form.prompt_completion else "all of the assistant's turns"
    told = f"conversations ({looked.turns or looked.form}), {looked.size}, loss on {learned} unless data.learn is set"
    columns = dict(looked.columns) | ({"messages": looked.turns} if looked.turns else {})
    return looked.as_module(ChatDataModule, told, "chat", columns)


def _fields(records: list[dict[str, Any]]) -> list[str]:
    """The fields that most records have."""
    counts = Counter(str(name) for record in records for name, value in record.items() if value is not None)
    return [name for name, count in counts.items() if 2 * count >= len(records)]


def _unknown(records: list[dict[str, Any]]) -> str:
    fields = _fields(records)
    if told := how_to_rewrite(fields):
        return f"records have {', '.join(fields)}, which is the form of {told}."
    for name, inner in ((name, inner) for record in records for name, inner in record.items() if may_hold(name)):
        if isinstance(inner, dict) and (lists := [key for key in inner if may_hold(key) and inner[key]]):
            return f"{name!r} is an object with {', '.join(map(repr, lists))}; move that to the top level."
    known = "; ".join(
        ("context, question, answers", "messages", "conversations", "instruction, output", "input, output", "text")
    )
    return (
        f"records have {', '.join(fields) or 'no field in common'}, which is not a known format ({known}); set the "
        "prompt and the answer with data.columns={'input': ..., 'output': ...}, or documents with data.text_key=..."
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
