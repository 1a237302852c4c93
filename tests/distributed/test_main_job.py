"""The quickstart's job as a user starts it: two processes, LoRA, adapters merged, answers before and after."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import command

PROMISED = {
    "recipe", "steps", "world_size", "expert_model_parallel_size", "first_loss", "last_loss", "tokens_per_second",
    "checkpoint", "exported", "em_before", "em_after",
}  # fmt: skip


def finetune(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of `mixtral-recipes finetune --peft lora --json`."""
    words = [str(Path(sys.executable).with_name("mixtral-recipes")), "finetune", "--peft", "lora", "--json"]
    environment = os.environ | {"MIXTRAL_RECIPES_HOME": str(folder / "home")}
    done = subprocess.run(
        [*words, "--dir", str(folder), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def evaluated(run: Path, *arguments: str) -> dict[str, Any]:
    """The result of `mixtral-recipes evaluate --json`."""
    words = [str(Path(sys.executable).with_name("mixtral-recipes")), "evaluate", str(run), "--json", *arguments]
    environment = os.environ | {"MIXTRAL_RECIPES_HOME": str(run.parent / "home")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_short_job_ends_in_one_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ["--name", "ep2", "trainer.max_steps=10", "trainer.log_every_n_steps=1"]
    result, run = finetune(tmp_path, "--evaluate", "8", *steps), tmp_path / "ep2"
    assert result.keys() >= PROMISED
    assert (result["recipe"], result["steps"], result["world_size"]) == ("mixtral_tiny", 10, 2)
    assert result["expert_model_parallel_size"] == 2
    assert result["last_loss"] < result["first_loss"]
    assert (Path(result["exported"]) / "model.safetensors").is_file()
    saved = list(Path(result["checkpoint"]).rglob("*.distcp"))
    assert 0 < sum(file.stat().st_size for file in saved) < 20e6  # adapters and their moments, not the model's 30 MB

    assert json.loads((run / "result.json").read_text()) == result
    assert "## Scores" in (run / "exported" / "README.md").read_text()
    samples = result["evaluation"]["samples"]
    assert len(samples) == 3
    assert all({"question", "expected", "before", "after"} == sample.keys() for sample in samples)
    assert (run / "report.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    again = ["finetune", "--peft", "lora", "--json", "--dir", str(tmp_path), "--evaluate", "8", *steps]
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    for words in (again, [*again, "--dry-run"]):  # finished: nothing was done
        assert json.loads(command(*words).stdout.splitlines()[-1]) == result
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before

    scored = evaluated(run, "--devices", "2", "--questions", "4")
    assert scored["scores"]["after"]["loss"]["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)
    kept = json.loads((run / "result.json").read_text())["evaluation"]["scores"]
    assert kept["after"] == scored["scores"]["after"]
    assert kept["before"] == result["evaluation"]["scores"]["before"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_base_in_four_bits_learns_as_one_in_thirty_two_does(tmp_path: Path) -> None:
    """30 steps of the recipe: the curves' mean distance, seen 0.9 % over 50."""
    steps = ["--evaluate", "0", "--no-export", "--nproc-per-node", "1"]
    steps += ["trainer.max_steps=30", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"]
    expected = losses(finetune(tmp_path, "--name", "lora", *steps))
    found = losses(finetune(tmp_path, "--peft", "qlora", "--name", "qlora", *steps))
    distance = sum(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert 0 < distance / sum(expected) < 0.02


def losses(result: dict[str, Any]) -> list[float]:
    """The loss of every step."""
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    found = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(found) == result["steps"]
    return found


def test_any_squad_file_can_be_learnt(tmp_path: Path) -> None:
    passages = [
        {"context": f"Box {n} holds {n * 7} pens.", "qas": [
            {"id": str(n), "question": f"How many pens are in box {n}?",
             "answers": [{"text": str(n * 7), "answer_start": len(f"Box {n} holds ")}]}]}
        for n in range(1, 61)
    ]  # fmt: skip
    file = tmp_path / "pens.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "Pens", "paragraphs": passages}]}))
    result = finetune(tmp_path, "--data", str(file), "--evaluate", "0", "--name", "pens", "trainer.max_steps=3")
    assert (result["steps"], "em_after" in result) == (3, False)


@pytest.mark.slow
def test_the_whole_job_learns_to_answer(tmp_path: Path) -> None:
    result = finetune(tmp_path)
    assert result["em_after"] >= 40
    assert result["em_after"] >= 2 * result["em_before"]
