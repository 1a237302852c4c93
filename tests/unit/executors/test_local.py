"""Real processes on this machine: torchrun, or one rank by itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import LaunchError, Preempted
from mixtral_recipes.executors import local
from mixtral_recipes.executors.launch import launch, restart
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs

JOBS = Path(__file__).parents[2] / "slurm"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(JOBS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    monkeypatch.syspath_prepend(str(JOBS))


def recipe(tmp_path: Path, name: str, processes: int = 2, **job: Any) -> Any:
    import nemo_run as run
    import slurm_job  # pyright: ignore[reportMissingImports]  # on PYTHONPATH above

    log = run.Config(slurm_job.Log, log_dir=str(tmp_path / "runs"), name=name)
    return run.Partial(slurm_job.train, log=log, trainer=run.Config(slurm_job.Trainer, devices=processes), **job)


def start(tmp_path: Path, name: str, processes: int = 2, **job: Any) -> dict[str, Any]:
    run_dir = tmp_path / "runs" / name
    return launch(recipe(tmp_path, name, processes, **job), executor="local", name=name, run_dir=run_dir)


@pytest.mark.parametrize("processes", [1, 2])
def test_finishes_and_shows_rank_0(processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = start(tmp_path, "good", processes, steps=3)
    assert (result["steps"], result["world_size"]) == (3, processes)
    shown = capsys.readouterr().out
    assert "rank 0 step 3" in shown
    assert "rank 1" not in shown
    assert runs.state(records.find(result["run"])).state == "succeeded"


def test_failed_rank_is_named_and_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="rank 1 failed: ValueError: told to fail in rank 1"):
        start(tmp_path, "bad", fail_rank=1)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert runs.state(records.find("bad")).state == "failed"


def test_sigterm_saves_and_the_run_resumes(tmp_path: Path) -> None:
    state = tmp_path / "runs" / "stopped" / "state.json"

    def stop() -> None:
        while not (state.exists() and json.loads(state.read_text())[0] >= 2):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Preempted):
        start(tmp_path, "stopped", steps=1000, step_s=0.1)
    step = json.loads(state.read_text())[0]
    record = records.find("stopped")
    assert runs.state(record).state == "preempted"
    stored = Path(record.job_dir, "recipe.json")
    stored.write_text(stored.read_text().replace("1000", str(step + 2)))
    assert restart(record)["steps"] == step + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_ranks_get_every_signal_as_sigterm(number: int) -> None:
    with subprocess.Popen(["sleep", "600"]) as agent, local._forwarded_signals(agent) as passed_on:
        os.kill(os.getpid(), number)
        assert agent.wait() == -signal.SIGTERM
        assert passed_on == [signal.SIGTERM]


def is_free(run_dir: Path) -> bool:
    try:
        with records.locked(run_dir):
            return True
    except LaunchError:
        return False


def test_a_killed_command_leaves_its_run_folder_locked(tmp_path: Path) -> None:
    state = tmp_path / "runs" / "left" / "state.json"
    command = os.fork()
    if command == 0:
        with contextlib.suppress(BaseException):
            start(tmp_path, "left", steps=1000, step_s=0.1)
        os._exit(1)
    while not state.exists():
        time.sleep(0.05)
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    record = records.find("left")
    with pytest.raises(LaunchError, match=r"left is in use by another run .*; choose another --name or --dir, or"):
        start(tmp_path, "left", steps=1000)
    assert runs.state(record).state == "running"
    assert records.all_records() == [record]
    runs.cancel(record)
    while runs.state(record).state == "running":
        time.sleep(0.05)
    assert runs.state(record).state == "preempted"
    while not is_free(state.parent):  # torchrun's last thread ends a moment after its first
        time.sleep(0.05)
    assert start(tmp_path, "left", steps=json.loads(state.read_text())[0])["steps"] > 0


def test_plain_nemo_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import nemo_run as run, slurm_job\n"
        "if __name__ == '__main__':\n"
        f"    log = run.Config(slurm_job.Log, log_dir={str(tmp_path)!r}, name='plain')\n"
        "    recipe = run.Partial(slurm_job.train, log=log, trainer=run.Config(slurm_job.Trainer), steps=2)\n"
        "    run.run(recipe, executor=run.LocalExecutor())\n"
        "    run.run(recipe, direct=True)\n"
    )
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NEMORUN_HOME": str(tmp_path / "nr"),
    }
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 0 step 2") == 1, done.stdout  # the second run found the first one's state
    assert json.loads((tmp_path / "plain" / "result.json").read_text())["steps"] == 2
