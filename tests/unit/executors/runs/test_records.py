"""Run records, locks, and who failed first."""

import os
from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning, Preempted
from mixtral_recipes.executors.local import raise_for_ranks
from mixtral_recipes.executors.runs import logs, records
from mixtral_recipes.executors.runs import states as runs
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.system import files
from mixtral_recipes.system.machine import process_start


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def record(tmp_path: Path, name: str = "r", **fields: object) -> RunRecord:
    defaults: dict[str, object] = {
        "executor": "local",
        "run_dir": str(tmp_path / "run"),
        "created": 1.0,
        "host": os.uname().nodename,
    }
    made = RunRecord(id=records.new_id(name), name=name, **(defaults | fields))  # type: ignore[arg-type]
    made.job_dir = made.job_dir or str(made.path.parent)
    made.save()
    return made


def end(folder: Path, rank: int, code: int, error: str = "", time: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    value = {"rank": rank, "host": "h", "exit_code": code, "error": error, "traceback": f"trace {rank}", "time": time}
    files.write_json(folder / f"rank-{rank}.json", value)
    if code == 75:
        (folder / "preempted").touch()


def test_files_are_private(tmp_path: Path, home: Path) -> None:
    made = record(tmp_path)
    assert made.path.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert made.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", ["", "{", '{"id": "another-123456"}', "[1]"])
def test_a_damaged_record_is_told_of_and_the_others_are_listed(tmp_path: Path, text: str) -> None:
    good, bad = record(tmp_path), record(tmp_path)
    bad.path.write_text(text)
    with pytest.warns(MixtralRecipesWarning, match=f"skipping a run: .*{bad.id}/run.json is not this run's record"):
        assert [one.id for one in records.all_records()] == [good.id]


def test_a_record_of_no_login_node_hides_no_other(tmp_path: Path) -> None:
    good = record(tmp_path, state="succeeded")
    bad = record(tmp_path, executor="slurm", ssh="-oProxyCommand=x", job_id="7")
    found = runs.states([good, bad])
    assert found[good.id].state == "succeeded"
    assert (found[bad.id].state, "is not a login node" in found[bad.id].detail) == ("unknown", True)


def test_find_by_id_job_and_name(tmp_path: Path) -> None:
    old = record(tmp_path, "tune", created=1.0)
    new = record(tmp_path, "tune", created=2.0, job_id="77")
    assert records.find(old.id).id == old.id
    assert records.find("77").id == new.id
    assert records.find("tune").id == new.id
    with pytest.raises(LaunchError, match="no run 'tun'"):
        records.find("tun")


def test_lost_connection_is_not_the_cause(tmp_path: Path) -> None:
    made = record(tmp_path, nproc_per_node=2)
    attempt = Path(made.job_dir, "attempts", "0")
    end(attempt, 0, 1, "RuntimeError: Connection closed by peer [127.0.0.1]:1", time=1.0)
    end(attempt, 1, 1, "ValueError: the cause", time=2.0)
    with pytest.raises(LaunchError, match="rank 1 failed: ValueError: the cause"):
        raise_for_ranks(made, 1)
    assert logs.failure(made)[0].startswith("rank 1 on h failed first")


def test_a_command_s_error_is_its_last_line(tmp_path: Path) -> None:
    made = record(tmp_path)
    attempt = Path(made.job_dir, "attempts", "0")
    attempt.mkdir(parents=True)
    (attempt / "node-0.log").write_text("note\nerror: no such model\n")
    assert logs.failure(made) == ["no such model"]
    made.executor = "slurm"
    assert list(logs.follow(made, 0, lambda: True)) == ["note", "error: no such model"]
    assert list(logs.lines(made, 0)) == ["== attempt 0: node-0.log", "note", "error: no such model"]
    made.recipe = "finetune"
    assert list(logs.follow(made, 0, lambda: True)) == []  # torchrun's, and no rank's


def test_a_script_that_started_no_rank_says_why_in_its_own_output(tmp_path: Path) -> None:
    made = record(tmp_path, executor="slurm", recipe="finetune", job_id="7")
    Path(made.job_dir, "attempts", "0").mkdir(parents=True)
    Path(made.job_dir, "sbatch_6.out").write_text("an earlier job's\n")
    Path(made.job_dir, "sbatch_7.out").write_text("line 75: /venv/bin/activate: No such file or directory\n")
    assert logs.failure(made) == ["line 75: /venv/bin/activate: No such file or directory"]


def test_the_folder_of_a_run_behind_ssh_is_named(tmp_path: Path) -> None:
    record(tmp_path, "far", executor="slurm", ssh="me@login#/keys/mine", run_dir="/scratch/me/runs/far")
    with pytest.raises(LaunchError, match=r"^run far-\w+ is in /scratch/me/runs/far on me@login: pass that"):
        records.run_folder("far")


def test_silent_rank_is_named_when_the_other_only_lost_it(tmp_path: Path) -> None:
    made = record(tmp_path, nproc_per_node=2)
    end(Path(made.job_dir, "attempts", "0"), 0, 1, "RuntimeError: Connection reset by peer")
    with pytest.raises(LaunchError, match="rank 1 ended without a report"):
        raise_for_ranks(made, 1)


def test_saved_ranks_mean_preempted_whatever_torchrun_says(tmp_path: Path) -> None:
    made = record(tmp_path, nproc_per_node=2)
    for rank in (0, 1):
        end(Path(made.job_dir, "attempts", "0"), rank, 75)
    for code in (0, 1):
        with pytest.raises(Preempted):
            raise_for_ranks(made, code)


def test_a_rank_that_lost_one_that_was_asked_to_stop_has_not_failed(tmp_path: Path) -> None:
    """Before training they leave at different moments."""
    made = record(tmp_path, nproc_per_node=2)
    end(Path(made.job_dir, "attempts", "0"), 0, 1, "RuntimeError: Connection closed by peer [127.0.0.1]:1", time=1.0)
    end(Path(made.job_dir, "attempts", "0"), 1, 75, "asked to stop before training began", time=2.0)
    with pytest.raises(Preempted, match="asked to stop before training began"):
        raise_for_ranks(made, 1, stopped=True)
    assert (logs.failure(made), runs.local_state(made).state) == ([], "preempted")


def test_a_stopped_run_says_what_it_saved(tmp_path: Path) -> None:
    made = record(tmp_path)
    end(Path(made.job_dir, "attempts", "0"), 0, 75, "stopped by SIGTERM at step 3; nothing was saved.")
    with pytest.raises(Preempted, match=rf"^r: stopped .* nothing was saved\. .*runs resume {made.id}`"):
        raise_for_ranks(made, 0)


def test_ranks_that_were_stopped_as_they_started_are_not_lost(tmp_path: Path) -> None:
    made = record(tmp_path, nproc_per_node=2)
    for code, stopped in ((1, True), (-15, False)):
        with pytest.raises(Preempted, match="was asked to stop, and ended without saying whether it saved"):
            raise_for_ranks(made, code, stopped=stopped)
    with pytest.raises(LaunchError, match="ranks 0, 1 ended without a report"):
        raise_for_ranks(made, -9)
    end(Path(made.job_dir, "attempts", "0"), 1, 2, "of its own")
    with pytest.raises(LaunchError, match="rank 1 failed: of its own"):
        raise_for_ranks(made, 1, stopped=True)


def test_a_launcher_that_was_stopped_when_all_was_done_has_not_failed(tmp_path: Path) -> None:
    made = record(tmp_path, nproc_per_node=2)
    for rank in (0, 1):
        end(Path(made.job_dir, "attempts", "0"), rank, 0)
    with pytest.raises(Preempted, match=r"^r was asked to stop after all its processes had done their work"):
        raise_for_ranks(made, 1, stopped=True)
    with pytest.raises(LaunchError, match="the job ended without a report"):
        raise_for_ranks(made, 1)


def test_only_the_last_attempt_counts(tmp_path: Path) -> None:
    made = record(tmp_path)
    for number, code in ((2, 1), (10, 0)):
        end(Path(made.job_dir, "attempts", str(number)), 0, code, "old error")
    raise_for_ranks(made, 0)
    assert logs.failure(made) == []


def test_local_state_without_the_process(tmp_path: Path) -> None:
    made = record(tmp_path, state="running", pid=os.getpid(), pid_start=process_start(os.getpid()))
    assert runs.local_state(made).state == "running"
    made.pid_start = "1"  # the pid was given to another process
    assert runs.local_state(made).state == "failed"
    end(Path(made.job_dir, "attempts", "0"), 0, 0)
    assert runs.local_state(made).state == "succeeded"
    made.host = "elsewhere"
    assert runs.local_state(made).state == "unknown"


def test_logs_of_one_rank(tmp_path: Path) -> None:
    log = tmp_path / "stdout.log"
    log.write_text("[default0]:a\n[default1]:b\ntorchrun's own\n[default10]:c\n[rank1]:d\n")
    made = record(tmp_path, nproc_per_node=2, logs=[str(log)])
    assert list(logs.lines(made, 1))[1:] == ["b", "d"]
    assert "torchrun's own" in list(logs.lines(made))
    assert list(logs.follow(made, 0, lambda: True)) == ["a"]
