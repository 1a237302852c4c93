"""A run by its name, id, Slurm job id or folder, wherever a command takes a run or its checkpoint."""

import json
from pathlib import Path

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.cli.options import checkpoint
from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.errors import CheckpointError, LaunchError
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.records import RunRecord


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def recorded(folder: Path, **fields: str) -> RunRecord:
    """A run that ended and left its metrics."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    record = RunRecord(
        id=records.new_id(folder.name), name=folder.name, executor="local", run_dir=str(folder), created=1.0,
        state="succeeded", **fields,
    )  # fmt: skip
    record.save()
    return record


def spellings(record: RunRecord) -> list[str]:
    return [record.name, record.id, record.job_id, record.run_dir, str(Path(record.run_dir).relative_to(Path.cwd()))]


def test_report_takes_every_spelling_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path / "elsewhere" / "first", job_id="77")
    page = tmp_path / "elsewhere" / "first" / "report.html"
    for spelled in spellings(record):
        assert main.run(["report", spelled, "--json"]) == 0, spelled
        (written,) = json.loads(capsys.readouterr().out)["files"]
        assert Path(written).resolve() == page
        page.unlink()


def test_runs_takes_every_spelling_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path / "elsewhere" / "first", job_id="77")
    recorded(tmp_path / "elsewhere" / "second")
    for spelled in spellings(record):
        assert main.run(["runs", "status", spelled, "--json"]) == 0, spelled
        assert json.loads(capsys.readouterr().out)["id"] == record.id


def test_the_status_of_a_run_is_lines_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path / "first")
    scores = {"scores": {"after": {"loss": {"val_loss": 1.5}}}}
    result = {"last_loss": 2.4118662940131292, "steps": 4, "share_of_peak": None, "evaluation": scores}
    (tmp_path / "first" / "result.json").write_text(json.dumps(result))
    assert main.run(["runs", "status", "first"]) == 0
    lines = dict(line.strip().split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["last_loss"].strip() == "2.41187"
    assert lines["steps"].strip() == "4"
    assert "share_of_peak" not in lines
    assert lines["evaluation"].strip() == f"see {record.run_dir}/result.json"


def test_a_run_without_a_record_is_found_in_the_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "lonely").mkdir(parents=True)
    (tmp_path / "runs" / "lonely" / "metrics.jsonl").write_text("")
    assert main.run(["report", "lonely"]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'runs' / 'lonely' / 'report.html'}\n"


@pytest.mark.parametrize(
    "line",
    ["report firts", "runs status firts", "runs logs firts", "runs cancel firts", "export firts x", "verify firts"],
)
def test_an_unknown_run_is_one_line_with_the_nearest_name(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path / "elsewhere" / "first")
    assert main.run(line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'firts'. Did you mean 'first'? Valid: first." in error


@pytest.mark.parametrize("line", ["report first", "runs status first", "verify first"])
def test_where_there_are_no_runs_no_empty_list_is_printed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(line.split()) == 2
    assert capsys.readouterr().err.endswith("run 'first'. See `mixtral-recipes runs list`.\n")


def test_completion_knows_the_runs(tmp_path: Path) -> None:
    recorded(tmp_path / "elsewhere" / "first")
    assert complete_run("fi") == ["first"]
    assert complete_run("x") == []


def saved(folder: Path, step: int) -> Path:
    """A folder with the manifest and the facts of a checkpoint at a step."""
    from mixtral_recipes.checkpoints.format.manifest import write_manifest

    (folder / "context").mkdir(parents=True)
    (folder / "context" / "run.json").write_text(json.dumps({"step": step, "consumed_samples": step}))
    write_manifest(folder, "training")
    return folder


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path / "elsewhere" / "first", job_id="77")
    saves = Path(record.run_dir) / "checkpoints"
    older, newest, broken = saved(saves / "step=9", 9), saved(saves / "step=10", 10), saved(saves / "step=11", 11)
    (broken / "context" / "run.json").write_text('{"step": 11, "consumed_samples": 110}')
    for spelled in spellings(record):
        assert checkpoint.checkpoint_folder(spelled).resolve() == newest, spelled
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith("Passing over step=11: ")
        assert said[1].startswith("Checkpoint: ")
        assert said[1].endswith("first/checkpoints/step=10")
    assert checkpoint.checkpoint_folder(str(older)) == older
    assert checkpoint.checkpoint_folder("elsewhere/first/checkpoints/step=9") == older


def test_training_starts_from_a_run_or_from_what_is_named(tmp_path: Path) -> None:
    record = recorded(tmp_path / "elsewhere" / "first", job_id="77")
    newest = saved(Path(record.run_dir) / "checkpoints" / "step=10", 10)
    (tmp_path / "model").mkdir()
    for spelled in spellings(record):
        assert Path(checkpoint.start_of_training(spelled)).resolve() == newest, spelled
    for text in ("hf://org/name", "org/name", "nemo://org/name", "model", "elsewhere/first/checkpoints/step=10"):
        assert checkpoint.start_of_training(text) == text
    with pytest.raises(LaunchError, match="no folder or run 'fist'"):
        checkpoint.start_of_training("fist")


def test_a_run_whose_folder_was_moved_is_told_so(tmp_path: Path) -> None:
    record = recorded(tmp_path / "elsewhere" / "first")
    Path(record.run_dir).rename(tmp_path / "moved")
    with pytest.raises(LaunchError, match="if it was moved, give the new one"):
        records.run_folder("first")
    assert records.run_folder("moved") == Path("moved")


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "elsewhere" / "first")
    saves = tmp_path / "elsewhere" / "first" / "checkpoints"
    saves.mkdir()
    with pytest.raises(
        CheckpointError, match=r"first has saved no checkpoint; `mixtral-recipes runs status \S+/first`"
    ):
        checkpoint.checkpoint_folder("first")
    (saved(saves / "step=9", 9) / "context" / "run.json").write_text('{"step": 9, "consumed_samples": 90}')
    with pytest.raises(CheckpointError, match="first/checkpoints holds no whole checkpoint; copy them again, or train"):
        checkpoint.checkpoint_folder("first")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("some/folder", "is not a folder; give a checkpoint folder or nemo://ID."),
        ("hf://org/name", "a checkpoint folder or nemo://ID is needed here."),
        ("nemo://org/name", "no finished import of that name"),
    ],
)
def test_other_places_are_refused_as_before(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoint.checkpoint_folder(text)
