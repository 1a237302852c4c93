"""Evaluation by generation: what is asked, and how answers are scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mixtral_recipes import embedded
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.errors import CheckpointError, DataError
from mixtral_recipes.evaluation import scores as evaluation


def test_held_out_questions_are_about_passages_training_never_sees() -> None:
    train, _ = SquadDataModule(dataset_root="embedded://squad").questions()
    asked = evaluation.held_out_questions("embedded://squad")
    assert asked
    assert not {q.context for q in asked} & {q.context for q in train}


def test_limit_spreads_over_the_passages() -> None:
    asked = evaluation.held_out_questions("embedded://squad", 40)
    assert len(asked) == 40
    assert len({q.context for q in asked}) > 20


def test_pretraining_text_has_no_held_out_passage() -> None:
    text = (embedded.resolve("embedded://squad") / "pretraining.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    for question in evaluation.held_out_questions("embedded://squad"):
        assert not any(question.context in document for document in documents)


def test_scores_are_squads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = evaluation.held_out_questions("embedded://squad", 4)
    given = [asked[0].answers[0], f"the {asked[1].answers[0].upper()}.", asked[2].answers[0] + " extra", "nothing"]
    monkeypatch.setattr(evaluation, "generate", lambda *args: iter(given))
    scores = evaluation.evaluate_squad(tmp_path, "embedded://squad", limit=4)
    assert scores["count"] == 4
    assert scores["exact_match"] == 50.0  # case, articles and punctuation do not count
    assert 50.0 < scores["f1"] < 75.0


def test_a_file_with_one_passage_has_nothing_to_ask(tmp_path: Path) -> None:
    record = {"id": "1", "context": "A cat sat.", "question": "Who sat?", "answers": {"text": ["A cat"]}}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="no held-out questions"):
        evaluation.held_out_questions(path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        list(evaluation.generate(tmp_path, ["x"]))


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0
    padding_side = "right"

    def __call__(self, prompts: list[str], **options: Any) -> transformers.BatchEncoding:
        longest = max(map(len, prompts))
        justify = str.rjust if self.padding_side == "left" else str.ljust
        rows = [[ord(letter) for letter in justify(prompt, longest, "\0")] for prompt in prompts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(rows)})

    def batch_decode(self, rows: torch.Tensor, **options: Any) -> list[str]:
        return ["".join(chr(token) for token in row if token) for row in rows.tolist()]


class Shouting(torch.nn.Module):
    """A model that answers with its prompt's letters as capitals, and nothing to one that ends in padding."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.batches.append(Letters().batch_decode(input_ids))
        ends_in_a_letter = input_ids[:, -1:] > 0
        return torch.cat([input_ids, torch.where(ends_in_a_letter & (input_ids > 0), input_ids - 32, 0)], 1)


def test_answers_come_in_the_order_of_the_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Shouting()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda *args, **options: Letters())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: model)
    prompts = ["dddd", "a", "eeeee", "bb", "ccc", "fffffff", "g"]
    answers = list(evaluation.generate(tmp_path, prompts, batch_size=2))
    assert answers == [prompt.upper() for prompt in prompts]
    assert model.batches == [["a", "g"], ["bb", "ccc"], ["dddd", "eeeee"], ["fffffff"]], "not batched by length"
