"""When ranks are started from a process, what reaches them, and what is remembered of the run."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import pytest
import torch

from mixtral_recipes import api
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, LaunchError, Preempted
from mixtral_recipes.executors import local, nemo_run_jobs, ranks_from_here
from mixtral_recipes.executors.runs import records, states
from mixtral_recipes.executors.stored import load_call, store_call
from mixtral_recipes.recipes import mixtral_tiny
from mixtral_recipes.training.distributed import ProcessPlace

STRAY = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}


@pytest.fixture(autouse=True)
def _login_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    for name, value in STRAY.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RUN_ID", "MIXTRAL_RECIPES_ATTEMPT_DIR", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_login_shell_s_variables_make_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ProcessPlace.from_environment() == ProcessPlace(0, 0, 1)
    assert ranks_from_here.wanted(num_nodes=1, devices=2)
    assert not ranks_from_here.wanted(num_nodes=1, devices=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert ProcessPlace.from_environment() == ProcessPlace(0, 0, 1), "nor does a part of a launcher's"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name, value in (("RANK", "three"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert ProcessPlace.from_environment() == ProcessPlace(0, 0, 1), name
    assert ProcessPlace.from_environment() == ProcessPlace(3, 3, 8)
    assert not ranks_from_here.wanted(num_nodes=4, devices=2)


def test_every_task_leaves_its_error_where_nemo_runs_scheduler_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(CheckpointError):
        api.export_ckpt(tmp_path / "nothing")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert str(tmp_path / "nothing") in message["message"]
    assert message["extraInfo"]["exit_code"] == 2


def test_several_nodes_need_a_launcher() -> None:
    with pytest.raises(LaunchError, match=r"trainer.num_nodes=2.*run.SlurmExecutor") as refused:
        ranks_from_here.wanted(num_nodes=2, devices=1)
    assert "\n" not in str(refused.value)


def test_no_ranks_are_started_for_gpus_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ranks_from_here, "start", lambda *_, **__: pytest.fail("ranks were started"))
    recipe = mixtral_tiny.finetune_recipe(name="x", dir=str(tmp_path), num_gpus_per_node=2)
    recipe.trainer.accelerator = "gpu"
    with pytest.raises(
        EnvironmentProblem, match=r"no usable CUDA device; run on a GPU node \(executor=run.SlurmExecutor"
    ):
        fdl.build(recipe)()


def test_a_run_without_a_place_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_from_here, "start", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr(api, "_train", lambda *_: pytest.fail("a run was started"))
    (tmp_path / "file").touch()
    for devices in (1, 2):
        recipe = mixtral_tiny.pretrain_recipe(name="x", dir=str(tmp_path / "file"), num_gpus_per_node=devices)
        with pytest.raises(
            EnvironmentProblem, match=rf"{tmp_path}/file/x cannot be created: {tmp_path}/file is a file"
        ):
            fdl.build(recipe)()
        with pytest.raises(EnvironmentProblem, match="cannot be created"):
            nemo_run_jobs.check(recipe, run.LocalExecutor())
        nemo_run_jobs.check(recipe, run.SlurmExecutor(account="a", ntasks_per_node=devices, packager=run.Packager()))
    recipe = mixtral_tiny.pretrain_recipe(name="n" * 240, dir=str(tmp_path))  # and its checkpoints' names are longer
    for begin in (fdl.build(recipe), lambda: nemo_run_jobs.check(recipe, run.LocalExecutor())):
        with pytest.raises(EnvironmentProblem, match=r"n--.*partial is too long for a folder name; use at most"):
            begin()


def test_ranks_run_under_this_interpreter_and_not_under_one_from_path(tmp_path: Path) -> None:
    one, two = (local.command(processes, tmp_path / "call.pickle") for processes in (1, 2))
    assert one == [sys.executable, "-m", "mixtral_recipes.executors.rank", str(tmp_path / "call.pickle")]
    assert two[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert two[-3:] == one[-3:]
    assert "--nproc-per-node=2" in two
    with pytest.raises(LaunchError, match="0 processes would start nothing"):
        local.command(0, tmp_path)


def test_a_call_is_private_and_finds_the_caller_s_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_script.py").write_text("VALUE = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Own:
        def __call__(self) -> int:
            import importlib

            return importlib.import_module("beside_the_script").VALUE

    file = tmp_path / "job" / "call.pickle"
    store_call(Own(), file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    assert load_call(file)() == 5


def test_what_belongs_to_this_process_is_refused_by_name(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(LaunchError, match=r"cannot be sent to its processes .*lock"):
        store_call(lambda: lock, tmp_path / "call.pickle")
    assert not (tmp_path / "call.pickle").exists()


@pytest.mark.parametrize(
    ("error", "state"), [(None, "succeeded"), (ValueError("x"), "failed"), (Preempted("saved"), "preempted")]
)
def test_a_run_in_this_process_is_in_the_list(error: Exception | None, state: str, tmp_path: Path) -> None:
    def train() -> None:
        with ranks_from_here.recorded(name="my run: 1", run_dir=tmp_path / "my run: 1", recipe="finetune"):
            (running,) = records.all_records()
            assert states.state(running).state == "running"
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            train()
    else:
        train()
    (record,) = records.all_records()
    assert (record.name, record.executor, states.state(record).state) == ("my run: 1", "direct", state)
    assert record.id.startswith("my-run-1-")


def test_a_rank_whose_launcher_keeps_the_record_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_ATTEMPT_DIR", str(tmp_path))
    with ranks_from_here.recorded(name="x", run_dir=tmp_path / "x", recipe="finetune"):
        pass
    assert not records.all_records()


def test_a_script_that_was_asked_to_stop_ends_as_a_command_does() -> None:
    code = "from mixtral_recipes.errors import Preempted\nraise Preempted('saved')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "")


def test_a_signal_at_a_rank_s_very_end_leaves_no_traceback(tmp_path: Path) -> None:
    """As torchrun sends it to a rank that is ending, once another has failed; why this one ended is recorded."""
    end = (
        "import atexit, os, signal, sys; atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM)); "
        "from mixtral_recipes.executors import rank; sys.argv[1:] = ['absent.json']; sys.exit(rank.main())"
    )
    environment = os.environ | {"MIXTRAL_RECIPES_ATTEMPT_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", end], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    (record,) = tmp_path.glob("rank-*.json")
    assert "absent.json" in json.loads(record.read_text())["error"]
