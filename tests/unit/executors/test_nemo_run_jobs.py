"""nemo_run's LocalExecutor with our tasks: this interpreter, a failure's exit code. And what we lean on in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = """
import nemo_run as run

from mixtral_recipes import embedded
from mixtral_recipes.executors import nemo_run_jobs

nemo_run_jobs.activate()
{}
print("still here")
"""
FAILS = "run.run(run.Partial(embedded.resolve, spec='embedded://nothing'), executor=run.LocalExecutor())"
WORKS = "run.run(run.Partial(embedded.resolve, spec='embedded://squad'), executor=run.LocalExecutor())"


def script(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(text))
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SLURM_PROCID": "3"}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return {"args": [sys.executable, str(file)], "env": environment, "cwd": tmp_path, "text": True}


def test_a_job_runs_under_this_interpreter_whatever_the_shell_has_in_its_variables(tmp_path: Path) -> None:
    done = subprocess.run(**script(tmp_path, WORKS), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("still here") == 1, done.stdout  # the job's process does not run the script to its end


def test_a_failed_job_fails_its_script(tmp_path: Path) -> None:
    done = subprocess.run(**script(tmp_path, FAILS), capture_output=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "still here" not in done.stdout
    assert "LaunchError: job mixtral_recipes.embedded.resolve failed" in done.stderr


def test_a_task_of_a_group_that_failed_fails_the_script(tmp_path: Path) -> None:
    group = (
        "tasks = [run.Partial(embedded.resolve, spec=f'embedded://{name}') for name in ('nothing', 'squad')]\n"
        "with run.Experiment('group') as group:\n"
        "    group.add(tasks, executor=[run.LocalExecutor(), run.LocalExecutor()], name='both')\n"
        "    group.run(detach=False)"
    )
    done = subprocess.run(**script(tmp_path, group), capture_output=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "LaunchError: job both failed" in done.stderr


@pytest.mark.parametrize(
    ("number", "passed"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)],
)
def test_what_asks_a_script_to_stop_reaches_its_jobs(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, passed: signal.Signals
) -> None:
    from mixtral_recipes.executors import nemo_run_jobs

    sent: list[int] = []
    process = SimpleNamespace(poll=lambda: None, send_signal=sent.append)
    app = SimpleNamespace(role_replicas={"rank": [SimpleNamespace(proc=process)]})
    monkeypatch.setattr(nemo_run_jobs, "_apps", lambda *_: [app])
    with nemo_run_jobs._signals_passed_on(None, [object()]):
        handler = signal.getsignal(number)
        assert callable(handler)
        handler(number, None)
    assert sent == [passed]


def test_a_job_that_has_done_its_task_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import atexit
    import importlib.util

    from mixtral_recipes.executors import nemo_run_jobs

    runner = importlib.util.find_spec("nemo_run.core.runners.fdl_runner")
    asked: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *call: asked.append(call))
    end = (signal.signal, signal.SIGTERM, signal.SIG_IGN)
    nemo_run_jobs.activate()
    assert end not in asked  # a script is stopped as ever
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", runner)
    nemo_run_jobs.activate()
    assert end in asked


@pytest.mark.parametrize(
    "order",
    ["from mixtral_recipes import pretrain; import nemo_run", "import nemo_run; from mixtral_recipes import pretrain"],
)
def test_a_recipe_is_checked_whichever_is_imported_first(order: str) -> None:
    ask = f"{order}; print(hasattr(nemo_run.Experiment._add_single_job, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_nemo_run_still_has_what_we_change() -> None:
    import inspect

    from nemo_run.run import experiment

    from mixtral_recipes.executors import nemo_run_jobs

    nemo_run_jobs.activate()
    nemo_run_jobs.activate()  # once only
    made, ran, waited = (getattr(experiment.Experiment, name) for name in ("__init__", "run", "_wait_for_jobs"))
    for changed in (made, ran, waited, experiment.LocalExecutor.assign):
        assert getattr(changed, "__wrapped__", None) is inspect.unwrap(changed)
    assert list(inspect.signature(experiment.Experiment._wait_for_jobs).parameters) == ["self", "jobs"]
    assert hasattr(experiment.get_runner(), "_scheduler_app_id")
