"""--json: whatever a command prints, the last line of stdout is one JSON object with its result."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.executors import checks
from mixtral_recipes.executors.checks import Check
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.system import machine

TINY = "--tokenizer embedded://mixtral_tiny"

# command line -> a key of its result
LINES = {
    "recipes list": "recipes",
    "recipes show mixtral_tiny.finetune": "settings",
    "recipes diff mixtral_tiny.finetune trainer.max_steps=3": "differences",
    "finetune --dry-run": "run_dir",
    "pretrain --recipe mixtral_tiny --executor direct --dry-run": "run_dir",
    "finetune --to-yaml saved.yaml": "yaml",
    f"data prepare text.jsonl -o corpus --workers 1 {TINY}": "documents",
    f"data check pairs.jsonl {TINY}": "records",
    f"data show pairs.jsonl -n 2 {TINY}": "samples",
    "runs list": "runs",
    "runs status first": "state",
    "report first": "files",
    "pipeline stages.toml --dry-run": "stages",
    "clusters list": "clusters",
    "clusters check big": "checks",
    "doctor": "checks",
}
# Lines that leave with 2 and yet give their result first
FAILING = {"doctor": "checks", "clusters check big": "checks", "data check broken.jsonl": "errors"}


@pytest.fixture(autouse=True)
def _a_place_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(tmp_path / "clusters.toml"))
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters.toml").write_text('[big]\npartition = "gpu"\n')
    (tmp_path / "stages.toml").write_text('[[stage]]\nname = "look"\ncommand = ["recipes", "list"]\n')
    (tmp_path / "text.jsonl").write_text('{"text": "A box."}\n' * 3)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Which?", "completion": "That."}\n' * 3)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Which?", "completion": "That."}\n' * 40 + '{"prompt": "x"}\n')
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "metrics.jsonl").write_text("")
    record = RunRecord("first-000000", "first", "local", str(tmp_path / "first"), created=1.0, state="succeeded")
    record.save()


def found(monkeypatch: pytest.MonkeyPatch, verdict: str) -> None:
    """Let this machine and every cluster be found so."""
    monkeypatch.setattr(checks, "check_machine", lambda **_: [Check("torch", verdict, "as it is", "mend it")])
    monkeypatch.setattr(checks, "check_cluster", lambda site: [Check("Slurm", verdict, "as it is")])


def result(line: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main.run([*line.split(), "--json"]) == code
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    return json.loads(out.splitlines()[-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", LINES)
def test_the_last_line_is_the_result(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, "good")
    assert LINES[line] in result(line, capsys)


@pytest.mark.parametrize("line", FAILING)
def test_a_bad_result_is_one_too(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, "bad")
    assert result(line, capsys, code=2)[FAILING[line]]


def test_without_json_no_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found(monkeypatch, "note")
    for line in ("recipes list", "runs list --all", "runs status first", "report first", "clusters list", "doctor"):
        assert main.run(line.split()) == 0
        assert "{" not in capsys.readouterr().out


def test_what_is_learned_of_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    samples = result(f"data show pairs.jsonl -n 2 {TINY}", capsys)["samples"]
    assert len(samples) == 2
    for sample in samples:
        assert 0 < sum(sample["learned"]) < len(sample["learned"]) <= len(sample["tokens"])
