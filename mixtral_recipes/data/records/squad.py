"""SQuAD's questions, from version 1.1 or 2.0, flat or nested as the official files are."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.learning import yes_or_no
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.record import Record, is_filled
from mixtral_recipes.errors import DataError

_READ = {"id", "context", "question", "answers", "is_impossible", "plausible_answers", "title", "paragraphs", "qas"}


class Question(NamedTuple):
    """One question.

    Attributes:
        id: Its identifier in the file.
        context: The passage.
        question: The question.
        answers: Accepted answers; the first one is learned. Empty where the passage holds none (version 2.0).
        unused: Fields nothing was read from.
    """

    id: str
    context: str
    question: str
    answers: list[str]
    unused: tuple[str, ...] = ()

    def prompt(self) -> str:
        """The text before the answer, in NeMo's format."""
        return f"Context: {self.context} Question: {self.question} Answer:"


def questions_of(record: Record, bad: BadRecord = stop) -> Iterator[tuple[Question, object]]:
    """The questions of a record, each with its place; bad ones are reported and left out."""
    for value, where in _flattened(record, bad):
        try:
            question = _question(value, where)
        except DataError as error:
            bad(error, value)
            continue
        yield question, where


def _flattened(record: Record, bad: BadRecord) -> Iterator[tuple[Any, object]]:
    """The record itself, or the questions of an article as the official files nest them (paragraphs -> qas)."""
    if "paragraphs" not in record.value:
        yield record.value, record.where
        return
    try:
        for p, paragraph in enumerate(_list_in(record.value, "paragraphs", record.where)):
            for q, qa in enumerate(_list_in(paragraph, "qas", f"{record.where}: paragraphs[{p}]")):
                where = _Place(record, qa, f"paragraphs[{p}].qas[{q}]")
                # The official files say of every question without an answer that it is one.
                about = {"is_impossible": False, "context": paragraph.get("context")}
                yield ({**about, **qa} if isinstance(qa, dict) else qa), where
    except DataError as error:
        bad(error, record.value)


def _list_in(holder: Any, name: str, where: str) -> list[Any]:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where}: needs {name!r}, a list.")
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
    answers = _answers(record, where)
    unused = tuple(name for name, found in record.items() if name not in _READ and is_filled(found))
    return Question(str(record.get("id", where)), record["context"], record["question"], answers, unused)


def _answers(record: dict[str, Any], where: object) -> list[str]:
    """The texts of the answers: a list of objects or texts, or the Hub's columns; none where it says so."""
    impossible = yes_or_no(record.get("is_impossible"))
    if impossible is None and is_filled(record.get("is_impossible")):
        raise DataError(f"{where}: 'is_impossible' is {record['is_impossible']!r}; it must be true or false.")
    if impossible:
        return []
    answers = record.get("answers")
    if isinstance(answers, str) and answers.lstrip()[:1] in ("[", "{"):  # as tables hold it
        try:
            answers = json.loads(answers)
        except ValueError as error:
            raise DataError(f"{where}: 'answers' is text that is not JSON ({error}).") from error
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list):
        raise DataError(f"{where}: 'answers' must be a list of texts, empty if there is no answer.")
    if not texts and impossible is False:
        raise DataError(f"{where}: 'answers' must have at least one text, or is_impossible must be true.")
    return [text_of(text.get("text") if isinstance(text, dict) else text, "answers", where) for text in texts]
