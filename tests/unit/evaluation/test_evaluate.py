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
