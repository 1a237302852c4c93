"""What is said about a job when Slurm answers, has forgotten it, or is away. Slurm's programs are played by scripts."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.system import files


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    for name in ("squeue", "sacct", "scancel"):
        play(folder, name, f"echo {name}: command not set up >&2; exit 1")
    return folder


def play(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_squeue_knows(programs: Path) -> None:
    play(programs, "squeue", "printf '7|RUNNING|None\\n8|PENDING|Dependency\\n'")
    states = slurm_status.query(["7", "8"])
    assert (states["7"].state, states["8"].state) == ("running", "pending")
    assert states["8"].detail == "PENDING (Dependency)"


def test_sacct_knows_what_squeue_forgot(programs: Path) -> None:
    play(programs, "squeue", FORGOTTEN)
    play(programs, "sacct", "echo '7|CANCELLED by 1000|0:15'")
    assert slurm_status.query(["7"])["7"].state == "cancelled"


def test_controller_away_is_unknown_and_never_cancelled(programs: Path, tmp_path: Path) -> None:
    play(programs, "squeue", AWAY)
    play(programs, "sacct", "echo '7|FAILED|1:0'")  # accounting may be behind; it is not asked
    play(programs, "scancel", f"touch {tmp_path}/asked; exit 1")
    made = slurm_run(tmp_path)
    assert runs.state(made).state == "unknown"
    assert records.find(made.id).state == "submitted"
    with pytest.raises(LaunchError, match="not cancelled"):
        runs.cancel(made)
    assert not Path(made.job_dir, "cancelled").exists()


def test_history_tells_an_end_without_slurm(programs: Path, tmp_path: Path) -> None:
    play(programs, "squeue", AWAY)
    made = slurm_run(tmp_path)
    write_history(made, ("started", "false"), ("preempted", "false"))
    assert runs.state(made).state == "unknown"  # it is in the queue again, as far as anyone knows
    write_history(made, ("started", "false"), ("preempted", "false"), ("started", "false"), ("succeeded", "true"))
    assert runs.state(made).state == "succeeded"
    assert runs.attempts(made) == {"attempts": 2, "preemptions": 1, "nodes_lost": 0, "failures": 0}


def test_end_of_an_earlier_job_of_a_resumed_run_does_not_count(programs: Path, tmp_path: Path) -> None:
    play(programs, "squeue", AWAY)
    made = slurm_run(tmp_path)
    write_history(made, ("started", "false"), ("cancelled", "true"))
    made.job_id = "8"  # resubmitted; its script has not started yet
    assert runs.state(made).state == "unknown"


def test_hostile_job_id_is_not_asked_about(programs: Path) -> None:
    assert slurm_status.query(["7;touch x"])["7;touch x"].state == "unknown"


def test_missing_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_status.query(["7"])["7"].state == "unknown"


def slurm_run(tmp_path: Path) -> RunRecord:
    made = RunRecord(
        id=records.new_id("s"), name="s", executor="slurm", run_dir=str(tmp_path / "run"), created=1.0, job_id="7"
    )
    made.job_dir = str(files.private_folder(tmp_path / "job"))
    made.save()
    return made


def write_history(made: RunRecord, *events: tuple[str, str]) -> None:
    lines = [
        f'{{"attempt": 0, "outcome": "{outcome}", "exit_code": 0, "final": {final}, "job_id": "7"}}'
        for outcome, final in events
    ]
    Path(made.job_dir, "attempts.jsonl").write_text("\n".join(lines) + "\n{half")


def test_through_a_login_node(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(programs, "ssh", 'for word; do last=$word; done; eval "$last"')
    (tmp_path / ".bash_profile").write_text(f"PATH={programs}:$PATH; echo Welcome")
    monkeypatch.setenv("HOME", str(tmp_path))
    play(programs, "squeue", "echo '7|RUNNING|None'")
    play(programs, "scancel", f'echo "$@" > {tmp_path}/cancelled')
    made = slurm_run(tmp_path)
    made.ssh = login.address("me@login:2222", "/keys/mine")
    made.remote_dir = str(tmp_path / "it's there")
    (tmp_path / "it's there").mkdir()
    assert runs.state(made).state == "running"
    runs.cancel(made)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert Path(made.remote_dir, "cancelled").exists()


def test_what_slurm_has_forgotten_is_fetched_from_the_job_folder(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(programs, "ssh", 'for word; do last=$word; done; eval "$last"')
    (tmp_path / ".bash_profile").write_text(f"PATH={programs}:$PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    play(programs, "squeue", FORGOTTEN)
    made = slurm_run(tmp_path)
    write_history(made, ("started", "false"), ("succeeded", "true"))
    made.ssh, made.remote_dir = "login", made.job_dir
    made.job_dir = str(files.private_folder(tmp_path / "here"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"steps": 3}')
    assert runs.state(made).state == "succeeded"
    assert runs.result(made) == {"steps": 3}


def test_why_a_login_node_says_nothing(programs: Path, tmp_path: Path) -> None:
    play(programs, "ssh", "echo 'Host key verification failed.' >&2; exit 255")
    made = slurm_run(tmp_path)
    made.ssh = "me@login:2222"
    why = "Host key verification failed; `ssh -p 2222 me@login` must log in without asking anything"
    said = f"login node me@login:2222: {why}"
    assert (runs.state(made).state, runs.state(made).detail) == ("unknown", said)
    assert runs.fetch(made) == said
