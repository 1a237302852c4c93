"""SQuAD: question answering over passages, from the Hub or from a file in any of its usual forms."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from mixtral_recipes.data.batches.samples import Encoded
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.finetuning import need_tokenizer, store_splits
from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.open import Source, open_source
from mixtral_recipes.data.records.pairs import Pair, PairEncoder, text_of
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

HUB_ID = "rajpurkar/squad"


class Question(NamedTuple):
    """One question.

    Attributes:
        id: Its identifier in the file.
        context: The passage.
        question: The question.
        answers: Accepted answers; the first one is learned.
    """

    id: str
    context: str
    question: str
    answers: list[str]

    def prompt(self) -> str:
        """The text before the answer, in NeMo's format."""
        return f"Context: {self.context} Question: {self.question} Answer:"


@takes_nemos_arguments
@dataclass
class SquadDataModule(DataModule):
    """SQuAD in NeMo's prompt, loss on the answer.

    Attributes:
        dataset_root: A SQuAD v1.1 JSON, JSONL or parquet file; a folder with a file per split; None takes
            ``rajpurkar/squad`` from the Hub. A single file gives 5 % of its passages to validation.
        tokenizer: Unused here; the model's tokenizer is given to `setup`.
        dataset_kwargs: Accepted for NeMo's recipes.
        val_proportion: Share of a single file's passages held out for validation.
        force_redownload: Whether the Hub is asked again although its files are cached.
        delete_raw: Accepted for NeMo's recipes; the Hub's cache is kept.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05  # NeMo's
    force_redownload: bool = False
    delete_raw: bool = True

    fixed_length = False
    form = "SQuAD"

    def datasets(self, tokenizer: Any) -> dict[str, Dataset[Any]]:
        """Read and tokenize both splits, once."""
        need_tokenizer(self, tokenizer)
        source = self._source()
        made_from = {"squad": source.identity(), "val_proportion": self.val_proportion}

        def splits() -> dict[str, Iterable[Encoded]]:
            encode = PairEncoder(tokenizer)
            train, validation = self._split(source)
            return {name: encode(map(_pair, q)) for name, q in (("train", train), ("validation", validation)) if q}

        return store_splits(self, tokenizer, made_from, splits, keep_end=True, hold_out=False)

    def check_records(self) -> None:
        """Read every question."""
        self.questions()

    def questions(self) -> tuple[list[Question], list[Question]]:
        """Training and validation questions; no passage is in both.

        Raises:
            DataError: names the file and line of the first record that cannot be used.
        """
        return self._split(self._source())

    def _source(self) -> Source:
        if self.dataset_root is None and self.force_redownload:
            import datasets

            datasets.load_dataset(HUB_ID, download_mode="force_redownload")
        return open_source(HUB_ID if self.dataset_root is None else self.dataset_root)

    def _split(self, source: Source) -> tuple[list[Question], list[Question]]:
        train = _read_split(source, "train")
        if "validation" in source.splits:
            return train, _read_split(source, "validation")
        return hold_out_passages(train, self.val_proportion)


def located_questions(source: Source, split: str, bad: BadRecord = stop) -> Iterator[tuple[Question, object]]:
    """The questions of a split, each with its place; bad records are reported and left out."""
    for record in source.records(split, bad):
        for value, where in _flattened(record, bad):
            try:
                question = _question(value, where)
            except DataError as error:
                bad(error, value)
                continue
            yield question, where


def _read_split(source: Source, split: str) -> list[Question]:
    questions = [question for question, _ in located_questions(source, split)]
    if not questions:
        raise DataError(f"{source.spec}: no questions in its {split} split.")
    return questions


def _pair(question: Question) -> Pair:
    return Pair(question.prompt(), " " + question.answers[0])


def hold_out_passages(questions: list[Question], proportion: float) -> tuple[list[Question], list[Question]]:
    """Split so that the last ``proportion`` of the passages is held out with all their questions."""
    passages = list(dict.fromkeys(q.context for q in questions))
    held_out = set(passages[len(passages) - max(1, round(len(passages) * proportion)) :] if len(passages) > 1 else [])
    return [q for q in questions if q.context not in held_out], [q for q in questions if q.context in held_out]


def _flattened(record: Record, bad: BadRecord) -> Iterator[tuple[Any, object]]:
    """The questions of a record: itself, or those of an article as v1.1 and v2.0 nest them (paragraphs -> qas)."""
    if "paragraphs" not in record.value:
        yield record.value, record.where
        return
    try:
        for p, paragraph in enumerate(_list_in(record.value, "paragraphs", record.where)):
            for q, qa in enumerate(_list_in(paragraph, "qas", f"{record.where}: paragraphs[{p}]")):
                where = _Place(record, qa, f"paragraphs[{p}].qas[{q}]")
                yield ({**qa, "context": paragraph.get("context")} if isinstance(qa, dict) else qa), where
    except DataError as error:
        bad(error, record.value)


def _list_in(holder: Any, name: str, where: str) -> list[Any]:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where}: needs a list {name!r}.")
    return value


class _Place(NamedTuple):
    """Where a question is in an article; its line is determined only when an error is reported."""

    article: Record
    question: Any
    place: str

    def __str__(self) -> str:
        path, _, line = self.article.where.rpartition(":")
        for name in ("id", "question"):
            value = self.question.get(name) if isinstance(self.question, dict) else None
            for spelled in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
                found = (self.article.text or "").find(spelled) if isinstance(value, str) else -1
                if found >= 0:
                    before = (self.article.text or "")[:found].count("\n")
                    return f"{path}:{int(line) + before}: {self.place}"
        return f"{self.article.where}: {self.place}"


def _question(record: Any, where: object) -> Question:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is not an object.")
    for name in ("context", "question"):
        text_of(record.get(name), name, where)
    answers = record.get("answers")
    if isinstance(answers, dict):  # the Hub's columns: {"text": [...], "answer_start": [...]}
        texts = answers.get("text")
    else:
        texts = [a.get("text") if isinstance(a, dict) else a for a in answers] if isinstance(answers, list) else None
    if texts is None or not len(texts):
        raise DataError(f"{where}: 'answers' must hold at least one text.")
    answers = [text_of(text, "answers", where) for text in texts]
    return Question(str(record.get("id", where)), record["context"], record["question"], answers)
