"""What is asked about is looked at before a model is loaded."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import MixtralRecipesError, RecipeError
from mixtral_recipes.evaluation.asked import Asked
from mixtral_recipes.evaluation.evaluate import evaluate
from mixtral_recipes.evaluation.recorded_data import data_of
from mixtral_recipes.settings.changes import describe


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"text": Path("missing.txt")}, "missing.txt"),
        ({"tasks": ("theirs",)}, "no such task"),
        ({}, "it was not trained by a run; pass a data set with --data"),
    ],
)
def test_nothing_is_loaded_for_what_is_not_there(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = SimpleNamespace(Tasks=mock.Mock(**{"find.side_effect": RecipeError("no such task")}))
    monkeypatch.setitem(sys.modules, "mixtral_recipes.evaluation.tasks", tasks)  # the harness takes seconds to import
    monkeypatch.setattr("mixtral_recipes.evaluation.asked.importlib.util.find_spec", mock.Mock())
    record = mock.Mock(return_value=Lineage("model", Identity()))
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.lineage.of_checkpoint", record)
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.InferenceModel", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MixtralRecipesError, match=message):
        evaluate(tmp_path, Asked(**asked), None)  # pyright: ignore[reportArgumentType]


def test_of_what_the_model_was_trained_on_the_part_that_is_measured_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("train.jsonl", "copy.jsonl", "other.jsonl")
    own, copied, other = (tmp_path / name for name in names)
    for number, file in enumerate((own, own, other)):
        file.write_text(f'{{"input": "a{number}", "output": "b"}}\n' * 40)
    copied.write_bytes(own.read_bytes())
    recipe = describe(data=FineTuningDataModule(dataset_root=str(own)), base="a model")
    record = Lineage("model", Identity(), recipe=recipe, code="x")
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.lineage.of_checkpoint", mock.Mock(return_value=record))
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate._models", lambda *given: iter(()))
    told: list[str] = []
    for file in (own, copied, other):
        evaluate(tmp_path, Asked(data=str(file)), None, say=told.append)  # pyright: ignore[reportArgumentType]
    assert len(told) == 2
    for file, line in zip((own, copied), told, strict=True):
        assert f"{file} is the training data and has no validation split; the 5 % that the run held out" in line


def test_of_another_file_everything_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n' * 40)
    data = data_of(None, str(file))
    data.seq_length = 32
    data.setup(load_tokenizer("embedded://mixtral_tiny"))
    assert len(data.samples("validation")) == 40
    assert data.samples("train") is None


def test_of_other_data_the_test_split_is_measured_where_there_is_no_validation_split(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 7)):
        (tmp_path / f"{name}.jsonl").write_text('{"input": "a", "output": "b"}\n' * count)
    data = data_of(None, str(tmp_path))
    data.seq_length = 32
    data.setup(load_tokenizer("embedded://mixtral_tiny"))
    assert len(data.samples("validation")) == 7
