"""The end of a run: how to go on from it, and that a finished one is left alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes import api
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.cli import main
from mixtral_recipes.cli.jobs import after_training, launch
from mixtral_recipes.cli.jobs.after_training import closing_lines, finish
from mixtral_recipes.executors.runs.records import asked_file, finished
from mixtral_recipes.settings.resume import AutoResume


def run(folder: Path, kind: str, *, template: bool = False) -> dict[str, Any]:
    """A run's folder with a checkpoint of a kind; its result."""
    checkpoint = folder / "checkpoints" / "last"
    (checkpoint / "context").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": "mixtral-recipes/1", "kind": kind, "files": {}}))
    (checkpoint / "context" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "x"} if template else {})
    )
    (folder / "metrics.jsonl").write_text('{"kind": "start", "step": 0}\n')
    result = {"steps": 20, "checkpoint": str(checkpoint), "run_dir": str(folder)}
    (folder / "result.json").write_text(json.dumps(result))
    return result


@pytest.mark.parametrize(("kind", "template"), [("adapter", False), ("training", True)])
def test_four_lines_say_how_to_go_on(
    tmp_path: Path, kind: str, template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(tmp_path / "runs" / "tune", kind, template=template)
    model, report, use, ship = closing_lines(tmp_path / "runs" / "tune", result)
    assert ("adapter " in model, result["checkpoint"] in model) == (kind == "adapter", True)
    assert str(tmp_path / "runs" / "tune" / "report.html") in report
    assert ("mixtral-recipes chat runs/tune;" in use, "generate" in use) == (template, not template)
    assert "mixtral-recipes serve runs/tune" in use
    assert "export runs/tune FOLDER" in ship
    assert "--format gguf" in ship
    exported = closing_lines(tmp_path / "runs" / "tune", result | {"exported": "/there"})[0]
    assert "/there (Hugging Face form)" in exported


def test_result_json_is_what_the_command_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path / "tune", "adapter") | {"recipe": "mixtral_tiny", "em_after": 90.0}
    result["evaluation"] = {
        "scores": {"before": {"squad": {"exact_match": 10.0}}, "after": {"squad": {"exact_match": 90.0}}},
        "samples": [{"question": "Who<b>?", "expected": "He", "before": "She", "after": "He"}],
    }
    assert finish(tmp_path / "tune", result) == json.loads((tmp_path / "tune" / "result.json").read_text()) == result
    assert len(capsys.readouterr().out.splitlines()) == 4
    page = (tmp_path / "tune" / "report.html").read_text()
    head = page[: page.index('class="tiles"')]
    for text in ("mixtral_tiny", "exact match", "10.0 %", "90.0 %", "Who&lt;b&gt;?", "She"):
        assert text in head, text


def test_a_finished_run_is_told_from_one_with_steps_left(tmp_path: Path) -> None:
    resume = AutoResume()
    assert finished(tmp_path / "tune", 20, resume) is None
    result = run(tmp_path / "tune", "adapter")
    write_manifest(Path(result["checkpoint"]), "adapter")
    assert finished(tmp_path / "tune", 20, resume) == result
    assert finished(tmp_path / "tune", 10, resume) == result
    assert finished(tmp_path / "tune", 21, resume) is None
    assert finished(tmp_path / "tune", 20, AutoResume(resume_if_exists=False)) is None
    assert finished(tmp_path / "tune", 20, AutoResume(resume_from_path="x")) is None
    (Path(result["checkpoint"]) / "context" / "tokenizer_config.json").unlink()
    assert finished(tmp_path / "tune", 20, resume) is None


def finished_as_asked(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """A command whose run has finished with the settings that it asks for; with others it was refused."""
    write_manifest(Path(run(folder / "tune", "adapter")["checkpoint"]), "adapter")
    line = ["finetune", "--peft", "lora", "--dir", str(folder), "--name", "tune", "--dry-run", "trainer.max_steps=20"]
    line += ["--no-export", "--evaluate", "0", *words]
    seen: dict[str, Any] = {}
    asked = launch._asked

    def noted(*given: Any, **named: Any) -> dict[str, Any]:
        seen.update(asked(*given, **named))
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_asked", noted)
        asked_file(folder / "tune").write_text(json.dumps({"peft.dim": 3}))
        assert main.run(line) == 2
    asked_file(folder / "tune").write_text(json.dumps(seen))
    return line


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_is_said_to_have_finished_in_a_dry_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    line = finished_as_asked(tmp_path, monkeypatch)
    assert "with other settings" in capsys.readouterr().err
    assert main.run(line) == 0
    said = capsys.readouterr()
    assert "tune has finished: 20 steps. Nothing was done" in said.err
    assert said.out.startswith("Model: ")


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_is_not_one_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a", "output": "b"}\n')
    line = finished_as_asked(tmp_path, monkeypatch, "--data", str(data))
    assert main.run(line) == 0
    capsys.readouterr()
    data.write_text('{"input": "a", "output": "c"}\n')
    assert main.run(line) == 2
    assert f"with other settings (the files of {data}: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_what_should_have_followed_a_finished_run_is_done_when_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    write_manifest(Path(run(tmp_path / "tune", "adapter")["checkpoint"]), "adapter")  # stopped before its export
    done: list[str] = []
    exported = tmp_path / "tune" / "exported"

    def export(checkpoint: Path, *, output_path: Path, **_: Any) -> None:
        done.append("export")
        output_path.mkdir()
        (output_path / "config.json").write_text("{}")

    def evaluated(job: Any, checkpoint: Path, questions: int) -> dict[str, Any]:
        done.append(f"{questions} questions")
        return {"evaluation": {"scores": {}}}

    monkeypatch.setattr(api, "export_ckpt", export)
    monkeypatch.setattr(after_training, "_evaluated", evaluated)
    line = ["finetune", "--peft", "lora", "--dir", str(tmp_path), "--name", "tune", "trainer.max_steps=20"]
    assert main.run([*line, "--dry-run"]) == 0
    assert "finished: 20 steps. Still to do: export and evaluate its model." in capsys.readouterr().err
    assert done == []
    assert main.run(line) == 0
    assert done == ["export", "100 questions"]
    result = json.loads((tmp_path / "tune" / "result.json").read_text())
    assert (result["exported"], result["evaluation"], result["steps"]) == (str(exported), {"scores": {}}, 20)
    assert main.run(line) == 0
    assert len(done) == 2
    assert "Nothing was done" in capsys.readouterr().err
    (exported / "config.json").unlink()
    exported.rmdir()
    assert main.run([*line, "--no-export"]) == 0
    assert len(done) == 2
    assert main.run(line) == 0
    assert done[2:] == ["export"]
