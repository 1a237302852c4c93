"""Pipeline files that are clumsy, and stages that are commands of this program."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.errors import LaunchError, Preempted
from mixtral_recipes.executors import pipeline
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.executors.slurm.status import JobState
from mixtral_recipes.training.guards.signals import stops_handled_by

STAGE = '[[stage]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stage = 1", "stage=1 is not allowed; it must be a list"),
        ("stage = [1]", "stage[0]=1 is not allowed; it must be a table"),
        ("name = 1\n" + STAGE, "name=1 is not allowed; it must be text"),
        ("dir = [1]\n" + STAGE, "dir=[1] is not allowed; it must be text"),
        (STAGE + 'command = "import x"', "stage 'a': command='import x' is not allowed; it must be a list"),
        (STAGE + "command = [1]", "stage 'a': command[0]=1 is not allowed; it must be text"),
        (STAGE + 'recipe = "x"\ntask = "evaluate"', "task='evaluate' is not allowed"),
        (STAGE + 'recipe = "x"\noverrides = "a=1"', "overrides='a=1' is not allowed; it must be a list"),
        (STAGE + 'recipe = "x"\nslurm = []', "slurm=[] is not allowed; it must be a table"),
        (STAGE + "after = true\ncommand = ['x']", "after=True is not allowed; it must be a list"),
        ("[[stage]]\nname = true\ncommand = ['x']", "name=True is not allowed; it must be text"),
        (STAGE + "comand = ['x']", "unknown key 'comand'"),
    ],
)
def test_a_clumsy_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(LaunchError) as caught:
        pipeline.read(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(STAGE + 'command = ["import", "x"]\n[[stage]]\nname = "b"\nrecipe = "mixtral_tiny"\n')
    read = pipeline.read(path)
    assert (read.name, [stage.name for stage in read.stages]) == ("p", ["a", "b"])
    assert read.stages[0].command == ("import", "x")
    assert read.stages[1].after == ("a",)


def test_what_waits_for_a_failed_stage_may_have_been_cancelled_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [RunRecord(name, name, "slurm", "/", 0.0, stage=name) for name in ("broken", "waiting", "never")]
    found = dict(zip(("broken", "waiting", "never"), ("failed", "pending", "pending"), strict=True))
    asked: list[str] = []

    def cancel(record: RunRecord) -> None:
        asked.append(record.id)
        raise LaunchError("has already ended")

    monkeypatch.setattr(pipeline.runs, "states", lambda runs: {name: JobState(s, "") for name, s in found.items()})
    monkeypatch.setattr(pipeline.runs, "cancel", cancel)
    with pytest.raises(LaunchError, match=r"stage 'broken' failed.*Not run: waiting, never"):
        pipeline.watch(records)
    assert asked == ["waiting", "never"]


def test_ctrl_c_ends_the_watching_while_slurm_is_asked_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def states(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.runs, "states", states)
    pipeline.watch([])
    assert "the jobs continue" in capsys.readouterr().err


def stages(folder: Path, *commands: str) -> pipeline.Pipeline:
    text = "".join(f'[[stage]]\nname = "s{n}"\ncommand = {command}\n' for n, command in enumerate(commands))
    (folder / "file.toml").write_text(text)
    return pipeline.read(folder / "file.toml")


def test_a_commands_result_is_the_stages(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = pipeline.run_local(
        stages(tmp_path, '["recipes", "list", "--json"]', '["recipes", "list"]'), lambda *given: None
    )
    assert "mixtral_8x7b" in str(found["s0"])
    assert found["s1"] == {}
    assert "mixtral_8x7b" in capfd.readouterr().out


def test_a_stage_that_fails_is_named_and_ends_the_rest(tmp_path: Path) -> None:
    with pytest.raises(
        LaunchError, match=r"'s0' failed: `mixtral-recipes evaluate` .* 2.*s1\. Continue with --from s0"
    ):
        pipeline.run_local(stages(tmp_path, '["evaluate", "nothing"]', '["recipes", "list"]'), lambda *given: None)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ('command = ["evaluat", "x"]', "unknown command 'evaluat'. Did you mean 'evaluate'?"),
        ('command = ["data", "chek", "x"]', "unknown command 'data chek'. Did you mean 'check'?"),
        ('command = ["evaluate", "x", "--qestions", "5"]', "No such option: --qestions"),
        ('command = ["evaluate", "x", "--questions", "five"]', "Invalid value for '--questions'"),
        ('command = ["evaluate"]', "Missing argument 'MODEL'"),
        ('command = ["evaluate", "--help"]', "it only shows its help"),
        ('command = ["data"]', "it only shows its help"),
        ('recipe = "mixtral_tiny"\noverrides = ["trainer.max_stepz=1"]', "trainer.max_stepz=1: Trainer has no setting"),
        ('recipe = "mixtral_tiny"\noverrides = ["data.global_batch_size=3"]', "global_batch_size=3 is not a multiple"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_what_cannot_run_is_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, told: str, dry: list[str]
) -> None:
    first = '[[stage]]\nname = "s0"\ncommand = ["recipes", "list"]\n'
    (tmp_path / "file.toml").write_text(f'{first}[[stage]]\nname = "s1"\n{stage}\n')
    assert main.run(["pipeline", str(tmp_path / "file.toml"), *dry]) == 2
    said = capsys.readouterr()
    assert "==" not in said.err, "no stage is begun"
    assert f"stage 's1': {told}" in said.err


def test_a_pipeline_that_runs_here_is_not_detached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.toml").write_text('[[stage]]\nname = "a"\ncommand = ["recipes", "list"]\n')
    assert main.run(["pipeline", str(tmp_path / "file.toml"), "--detach", "--dry-run"]) == 2
    assert "--detach has no effect with --executor local; use --executor slurm." in capsys.readouterr().err


def test_a_stage_that_is_stopped_stops_the_pipeline_as_it_would_end_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted = tmp_path / "python"
    preempted.write_text("#!/bin/sh\nexit 75\n")
    preempted.chmod(0o755)
    monkeypatch.setattr(pipeline.sys, "executable", str(preempted))
    with pytest.raises(Preempted, match=r"'s0' was stopped: `mixtral-recipes finetune` saved.*started: s1.*--from s0"):
        pipeline.run_local(stages(tmp_path, '["finetune"]', '["recipes", "list"]'), lambda *given: None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_passed_on_to_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    @contextlib.contextmanager
    def handled(handler: Any) -> Iterator[None]:
        with stops_handled_by(handler):
            (tmp_path / "ready").touch()
            yield

    monkeypatch.setattr(pipeline, "stops_handled_by", handled)
    stage = tmp_path / "python"
    name = number.name.removeprefix("SIG")
    stage.write_text(
        f"#!/bin/sh\ntrap 'echo told >{tmp_path}/told; exit {code}' {name}\n"
        f"while [ ! -e {tmp_path}/ready ]; do sleep 0.05; done\nkill -{name} {os.getpid()}\n"
        "for _ in $(seq 100); do sleep 0.05; done\n"
    )
    stage.chmod(0o755)
    monkeypatch.setattr(pipeline.sys, "executable", str(stage))
    told = r"'s0' was stopped: `mixtral-recipes import` .*s1\. Continue with --from s0"
    with pytest.raises(Preempted, match=told) as stop:
        pipeline.run_local(stages(tmp_path, '["import", "x"]', '["recipes", "list"]'), lambda *given: None)
    assert stop.value.exit_code == stop.value.code == code
    assert (tmp_path / "told").exists()


def test_a_pipeline_goes_on_with_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f'[[stage]]\nname = "{name}"\ncommand = ["recipes", "list"]\n' for name in ("a", "b", "c"))
    file = tmp_path / "file.toml"
    file.write_text(f'{text}after = ["a", "b"]\n')
    rest = pipeline.read(file).starting_with("b")
    assert [(stage.name, stage.after) for stage in rest.stages] == [("b", ()), ("c", ("b",))]
    assert main.run(["pipeline", str(file), "--from", "c", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["c: recipes list"]
    assert main.run(["pipeline", str(file), "--from", "d"]) == 2
    assert "--from d: pipeline 'file' has no stage of this name." in capsys.readouterr().err
