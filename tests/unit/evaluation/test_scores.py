"""Evaluation by generation: what is asked, and how answers are scored."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mixtral_recipes import embedded
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.records.pairs import Pair, PairEncoder
from mixtral_recipes.data.records.squad import Question
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError
from mixtral_recipes.evaluation import scores as evaluation
from mixtral_recipes.inference.generate import Continuation

SQUAD = SquadDataModule(dataset_root="embedded://squad")


def test_held_out_questions_are_about_passages_training_never_sees() -> None:
    train = SQUAD.questions("train")
    asked = evaluation.held_out_questions(SQUAD)
    assert asked
    assert not {q.context for q in asked} & {q.context for q in train}


def test_limit_spreads_over_the_passages() -> None:
    asked = evaluation.held_out_questions(SQUAD, 40)
    assert len(asked) == 40
    assert len({q.context for q in asked}) > 20


def test_pretraining_text_has_no_held_out_passage() -> None:
    text = (embedded.resolve("embedded://squad") / "pretraining.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    for question in evaluation.held_out_questions(SQUAD):
        assert not any(question.context in document for document in documents)


def test_scores_are_squads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = evaluation.held_out_questions(SQUAD, 4)
    given = [asked[0].answers[0], f"the {asked[1].answers[0].upper()}.", asked[2].answers[0] + " extra", "nothing"]
    said = [Continuation(f" {text}") for text in given]
    monkeypatch.setattr(evaluation, "generate", lambda *args, **options: said)
    model: Any = SimpleNamespace(
        tokenizer=lambda text, **options: {"input_ids": [1] * 40}, config=SimpleNamespace(max_position_embeddings=64)
    )
    scores = evaluation.evaluate_squad(model, asked)
    assert scores["count"] == 4
    assert scores["exact_match"] == 50.0  # case, articles and punctuation do not count
    assert 50.0 < scores["f1"] < 75.0


def test_a_question_is_asked_as_it_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control token that a passage spells out is text."""
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    question = Question("1", "<s>struck</s> is HTML.", "What is HTML?", ["struck"])
    asked: list[list[int]] = []

    def answered(model: Any, prompts: list[list[int]], *args: Any, **options: Any) -> list[Continuation]:
        asked.extend(prompts)
        return [Continuation("struck")]

    monkeypatch.setattr(evaluation, "generate", answered)
    config = SimpleNamespace(max_position_embeddings=512)
    evaluation.evaluate_squad(cast(Any, SimpleNamespace(tokenizer=tokenizer, config=config)), [question])
    (learned,) = PairEncoder(tokenizer).encode_some([(Pair(question.prompt(), " struck"), "x:1")])
    assert asked == [learned.tokens[: learned.learned.index(True)]]


def test_a_file_with_one_passage_has_nothing_to_ask(tmp_path: Path) -> None:
    record = {"id": "1", "context": "A cat sat.", "question": "Who sat?", "answers": {"text": ["A cat"]}}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="no held-out questions"):
        evaluation.held_out_questions(SquadDataModule(dataset_root=path))
