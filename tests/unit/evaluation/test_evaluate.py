"""What is asked about is looked at before a model is loaded."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.errors import MixtralRecipesError, RecipeError
from mixtral_recipes.evaluation.asked_for import Asked
from mixtral_recipes.evaluation.evaluate import evaluate


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"text": Path("missing.txt")}, "missing.txt"),
        ({"tasks": ("theirs",)}, "no such task"),
        ({}, "no run trained it: name a data set with --data"),
    ],
)
def test_nothing_is_loaded_for_what_is_not_there(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = SimpleNamespace(Tasks=mock.Mock(**{"find.side_effect": RecipeError("no such task")}))
    monkeypatch.setitem(sys.modules, "mixtral_recipes.evaluation.tasks", tasks)  # the harness takes seconds to import
    monkeypatch.setattr("mixtral_recipes.evaluation.asked_for.importlib.util.find_spec", mock.Mock())
    record = mock.Mock(return_value=Lineage("model", Identity()))
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.lineage.of_checkpoint", record)
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.InferenceModel", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MixtralRecipesError, match=message):
        evaluate(tmp_path, Asked(**asked), None)  # pyright: ignore[reportArgumentType]


def test_data_of_which_a_part_is_measured_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = mock.Mock(return_value=Lineage("model", Identity()))
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate.lineage.of_checkpoint", record)
    monkeypatch.setattr("mixtral_recipes.evaluation.evaluate._models", lambda *given: iter(()))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (folder / name).write_text('{"input": "a", "output": "b"}\n')
    told: list[str] = []
    evaluate(tmp_path, Asked(data=str(folder / "train.jsonl")), None, say=told.append)  # pyright: ignore[reportArgumentType]
    assert len(told) == 1
    assert "train.jsonl has no validation split: what a run holds out of it is measured, 5 %" in told[0]
    evaluate(tmp_path, Asked(data=str(folder)), None, say=told.append)  # pyright: ignore[reportArgumentType]
    assert len(told) == 1
