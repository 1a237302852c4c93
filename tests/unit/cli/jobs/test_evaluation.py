"""The file of answers that `evaluate --predictions` writes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_recipes.cli.jobs import evaluation
from mixtral_recipes.errors import EnvironmentProblem


def measured(predictions: Path, answers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the model was asked."""
    asked: list[Any] = []

    def evaluate(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return SimpleNamespace(scores={}, samples=[], predictions=answers)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "join", lambda topology: topology)
    monkeypatch.setattr(evaluation, "_keep", lambda *args: None)
    try:
        evaluation.measure(Path("model"), Any, None, predictions=predictions)
    except (EnvironmentProblem, IsADirectoryError):
        assert not predictions.is_file()
    return len(asked)


def test_it_is_refused_before_the_model_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert measured(tmp_path / "file" / "answers.json", {"1": "yes"}, monkeypatch) == 0
    assert measured(tmp_path, {"1": "yes"}, monkeypatch) == 0
    assert measured(tmp_path / "new" / "answers.json", {"1": "yes"}, monkeypatch) == 1
    assert (tmp_path / "new" / "answers.json").read_text() == '{\n "1": "yes"\n}'


def test_without_answers_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path / "answers.json", {}, monkeypatch)
    assert "answers.json was not written, because no SQuAD question was asked." in capsys.readouterr().err
    assert not (tmp_path / "answers.json").exists()
