"""A run by its name, id, Slurm job id or folder, wherever a command takes a run or its checkpoint."""

import json
import os
from pathlib import Path

import nemo_run as run
import pytest

from mixtral_recipes.checkpoints.load import find_checkpoint
from mixtral_recipes.checkpoints.retention import Kept, remove_unused
from mixtral_recipes.cli import main
from mixtral_recipes.cli.options.runs import complete_run
from mixtral_recipes.errors import CheckpointError, LaunchError
from mixtral_recipes.executors import nemo_run_jobs, preflight
from mixtral_recipes.executors.runs import checkpoints, records
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.settings.evaluation import ApiEndpoint, EvaluationTarget
from mixtral_recipes.settings.objects import as_configs
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.system import locks
from mixtral_recipes.system.machine import process_start


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


def test_cancel_takes_the_run_that_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append(pid))
    running = recorded(tmp_path / "elsewhere" / "first")
    running.state, running.host, running.pid = "running", os.uname().nodename, os.getpid()
    running.pid_start = process_start(os.getpid())
    running.save()
    refused = recorded(tmp_path / "another" / "first")  # started while the first one ran
    refused.created, refused.state = 2.0, "failed"
    refused.save()
    assert main.run(["runs", "cancel", "first"]) == 0
    assert killed == [os.getpid()]
    assert main.run(["runs", "cancel", refused.id]) == 2


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


def test_a_rank_that_a_run_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = recorded(tmp_path / "first")
    assert main.run(["runs", "logs", "first", "--rank", "9"]) == 2
    assert f"--rank 9: the last rank of run {record.id} is " in capsys.readouterr().err


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
        assert checkpoints.checkpoint_folder(spelled).resolve() == newest, spelled
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith("Skipping step=11: ")
        assert said[1].startswith("Checkpoint: ")
        assert said[1].endswith("first/checkpoints/step=10")
    assert checkpoints.checkpoint_folder(str(older)) == older
    assert checkpoints.checkpoint_folder("elsewhere/first/checkpoints/step=9") == older


def test_a_run_that_removes_checkpoints_keeps_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has saved step 11 and removes step 10 just as a command is about to choose it."""
    saves = Path(recorded(tmp_path / "first").run_dir) / "checkpoints"
    older, newest = saved(saves / "step=10", 10), saves / "step=11"

    def choose_too_late(file: Path) -> None:
        if not newest.exists():
            older.rename(saved(newest, 11).with_name(".step=10.deleted"))
        use(file)

    use = locks.use
    monkeypatch.setattr(locks, "use", choose_too_late)
    assert checkpoints.checkpoint_folder("first").resolve() == newest
    remove_unused([Kept(newest, 11, 1.0)])
    assert newest.exists()


def test_the_first_rank_chooses_for_all_that_load_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path(recorded(tmp_path / "first").run_dir) / "checkpoints" / "step=10", 10)
    monkeypatch.setattr(checkpoints, "first", lambda work, group: work().with_name("of rank 0"))
    assert checkpoints.model_checkpoint("first").name == "of rank 0"
    restore = checkpoints.with_start(AutoResume(restore_config=RestoreConfig(path="first"))).restore_config
    assert Path(restore.path).name == "of rank 0"
    assert checkpoints.checkpoint_folder("first").name == "step=10"  # by one process alone


def test_training_starts_from_a_run_or_from_what_is_named(tmp_path: Path) -> None:
    record = recorded(tmp_path / "elsewhere" / "first", job_id="77")
    newest = saved(Path(record.run_dir) / "checkpoints" / "step=10", 10)
    (tmp_path / "model").mkdir()

    def start(text: str) -> str:
        named = AutoResume(restore_config=RestoreConfig(path=text))
        of_object, of_config = checkpoints.with_start(named), checkpoints.with_start(as_configs(named))
        assert of_object.restore_config.path == of_config.restore_config.path
        assert named.restore_config is not None
        assert named.restore_config.path == text  # a notebook's own object, which may train again
        return of_object.restore_config.path

    for spelled in spellings(record):
        assert Path(start(spelled)).resolve() == newest, spelled
    for text in ("hf://org/name", "org/name", "nemo://org/name", "model", "elsewhere/first/checkpoints/step=10"):
        assert start(text) == text
    with pytest.raises(LaunchError, match="no folder or run 'fist'"):
        start("fist")
    assert checkpoints.with_start(AutoResume()) == AutoResume()
    others = checkpoints.with_start(AutoResume(RestoreConfig("model", adapter_path="first"), resume_from_path="77"))
    for place in (others.restore_config.adapter_path, others.resume_from_path):
        assert Path(place).resolve() == newest
    assert others.restore_config.path == "model"


def test_a_run_may_resume_from_another_one_s_folder(tmp_path: Path) -> None:
    first = Path(recorded(tmp_path / "first").run_dir)
    newest = saved(first / "checkpoints" / "step=10", 10)
    for folder in (first, first / "checkpoints"):
        assert find_checkpoint(AutoResume(resume_from_directory=str(folder)), tmp_path / "second") == newest
    (newest / "context" / "run.json").write_text('{"step": 10, "consumed_samples": 11}')
    with pytest.raises(CheckpointError, match=f"^{first}/checkpoints: none of its 1 checkpoint"):
        find_checkpoint(AutoResume(resume_from_directory=str(first)), tmp_path / "second")


def test_a_run_whose_folder_was_moved_is_told_so(tmp_path: Path) -> None:
    record = recorded(tmp_path / "elsewhere" / "first")
    Path(record.run_dir).rename(tmp_path / "moved")
    with pytest.raises(LaunchError, match="if it was moved, pass the new folder"):
        records.run_folder("first")
    assert records.run_folder("moved") == Path("moved")


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "elsewhere" / "first")
    saves = tmp_path / "elsewhere" / "first" / "checkpoints"
    saves.mkdir()
    with pytest.raises(
        CheckpointError, match=r"first has not saved a checkpoint; see `mixtral-recipes runs status \S+/first`"
    ):
        checkpoints.checkpoint_folder("first")
    (saved(saves / "step=9", 9) / "context" / "run.json").write_text('{"step": 9, "consumed_samples": 90}')
    with pytest.raises(
        CheckpointError, match="first/checkpoints holds no intact checkpoint; copy the checkpoints again"
    ):
        checkpoints.checkpoint_folder("first")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("some/folder", "does not exist; pass a checkpoint folder or nemo://ID."),
        ("hf://org/name", "not supported here; pass a checkpoint folder or nemo://ID."),
        ("nemo://org/name", "no finished import of that name"),
    ],
)
def test_other_places_are_refused_as_before(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoints.checkpoint_folder(text)


def test_python_takes_a_run_wherever_a_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_recipes import api
    from mixtral_recipes.evaluation import from_python
    from mixtral_recipes.importers import exports

    record = recorded(tmp_path / "elsewhere" / "first")
    newest = saved(Path(record.run_dir) / "checkpoints" / "step=10", 10)
    seen: list[Path] = []
    monkeypatch.setattr(from_python, "generate", lambda checkpoint, *rest, **options: seen.append(checkpoint) or [])
    monkeypatch.setattr(from_python, "evaluate", lambda checkpoint, *rest: seen.append(checkpoint) or {})
    monkeypatch.setattr(exports, "export", lambda checkpoint, *rest, **options: seen.append(checkpoint))
    target = EvaluationTarget(ApiEndpoint(nemo_checkpoint_path="first"))
    for call in (
        lambda: api.generate(record.id, prompts=["a"], text_only=True),
        lambda: api.evaluate("first"),
        lambda: api.evaluate(target),
        lambda: api.export_ckpt("first"),
        lambda: api.export_ckpt(Path("elsewhere/first")),
    ):
        call()
        assert seen.pop().resolve() == newest
    for call in (
        lambda: api.generate("fist", prompts=["a"]),
        lambda: api.evaluate("fist"),
        lambda: api.export_ckpt("fist"),
    ):
        with pytest.raises(LaunchError, match=r"no folder or run 'fist'\. Did you mean 'first'\?"):
            call()


def test_a_recipe_names_the_run_it_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mixtral_recipes as llm

    record = recorded(tmp_path / "elsewhere" / "first")
    newest = saved(Path(record.run_dir) / "checkpoints" / "step=10", 10)
    seen: list[Path] = []
    for module in (nemo_run_jobs, preflight):
        monkeypatch.setattr(module, "preflight", lambda recipe, *rest, **options: seen.append(recipe))
    recipe = llm.mixtral_tiny.finetune_recipe(name="second", dir="runs")
    recipe.resume.restore_config.path = "first"
    nemo_run_jobs.check(recipe, run.LocalExecutor())
    assert main.run(["finetune", "--recipe", "mixtral_tiny", "resume.restore_config.path=first", "--dry-run"]) == 0
    assert [Path(each.resume.restore_config.path).resolve() for each in seen] == [newest, newest]
    recipe.resume.restore_config.path = "fist"  # NeMo's way, where nothing looked at the recipe before
    with pytest.raises(LaunchError, match=r"no folder or run 'fist'\. Did you mean 'first'\?"):
        run.run(recipe, direct=True)
