"""Scripts as NeMo's users write them train on every device they name, without a launcher.

Each is a process of its own, started (but one) where nothing is activated and the shell has a job's variables. None has
``if __name__ == "__main__"``, and each trains on a class of its own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
STEPS = 3
CHANGES = {
    "trainer.max_steps": STEPS, "trainer.log_every_n_steps": 1, "trainer.val_check_interval": 0,
    "trainer.limit_val_batches": 1, "data.global_batch_size": 8, "data.micro_batch_size": 4,
}  # fmt: skip
STRAY = {
    "SLURM_NTASKS": "8", "SLURM_PROCID": "3", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x",
}  # fmt: skip
RECIPE = """
import fiddle as fdl
import nemo_run as run

import mixtral_recipes as llm


class Mine(llm.SquadDataModule):
    pass


class Fails:
    def on_step_start(self, run, step):
        import torch

        if torch.distributed.get_rank() == 1 and step == 2:
            raise ValueError("told to fail")


recipe = llm.mixtral_tiny.finetune_recipe(name="NAME", dir="runs", num_nodes=1, num_gpus_per_node=2)
recipe.trainer.max_steps = 3
recipe.trainer.log_every_n_steps = 1
recipe.trainer.val_check_interval = 0
recipe.trainer.limit_val_batches = 1
recipe.data = run.Config(
    Mine, dataset_root="embedded://squad", seq_length=256, global_batch_size=8, micro_batch_size=4
)
"""
WAYS = {
    "plain": "parts = {name: fdl.build(part) for name, part in fdl.ordered_arguments(recipe).items()}\n"
    "run_dir = llm.finetune(**parts)\nassert (run_dir / 'result.json').is_file(), run_dir\n",
    "built": "fdl.build(recipe)()\n",
    "direct": "run.run(recipe, direct=True)\n",
    "executor": "run.run(recipe, executor=run.LocalExecutor())\n",
    "experiment": "with run.Experiment('mine', executor=run.LocalExecutor()) as experiment:\n"
    "    experiment.add(recipe, name='job')\n    experiment.run()\n",
    "torchrun": "executor = fdl.build(llm.torchrun(devices=2))\nrun.run(recipe, executor=executor)\n",
}
LONG = "recipe.trainer.max_steps = 10_000\n"
FAILING = "recipe.trainer.callbacks = [run.Config(Fails)]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all scripts run: they share the imported model."""
    return tmp_path_factory.mktemp("from_python")


def environment(folder: Path, *, activated: bool = False) -> dict[str, str]:
    path = "/usr/bin:/bin"
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "LANG", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    own = {"HOME": str(folder), "MIXTRAL_RECIPES_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    if activated:
        return kept | own | {"PATH": f"{Path(sys.executable).parent}:{path}"}
    return kept | own | STRAY | {"PATH": path}


def script(folder: Path, way: str, name: str, more: str = "") -> list[str]:
    file = folder / f"{name}.py"
    file.write_text(RECIPE.replace("NAME", name) + more + WAYS[way])
    return [sys.executable, str(file)]


def ran(command: list[str], folder: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = environment(folder, **kwargs)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=540)


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, on two processes."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["world_size"], result["expert_model_parallel_size"], len(found)) == (2, 2, STEPS)
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of ``--executor local``."""
    changes = [f"{path}={value}" for path, value in CHANGES.items()]
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", "finetune", "--recipe", "mixtral_tiny", "--no-export"]
    done = ran([*command, "--num-gpus-per-node", "2", "--name", "local", *changes], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "runs" / "local")


def runs_list(folder: Path) -> dict[str, dict[str, Any]]:
    """What ``runs list`` says, by name."""
    done = ran([sys.executable, "-m", "mixtral_recipes.cli.main", "runs", "list", "--json"], folder)
    assert done.returncode == 0, done.stderr
    return {run["name"]: run for run in json.loads(done.stdout.splitlines()[-1])["runs"]}


@pytest.mark.parametrize("way", ["plain", "built", "executor", "torchrun"])
def test_a_script_trains_on_every_device_it_names(way: str, folder: Path, expected: list[float]) -> None:
    done = ran(script(folder, way, way), folder, activated=way == "executor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder / "runs" / way) == expected
    assert runs_list(folder)[way]["state"] == "succeeded"
    assert runs_list(folder)[way]["world_size"] == 2
    if way in ("plain", "built"):
        assert "\nstep 3/3  loss" in done.stdout
        assert "default1" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "executor", [[], ["run.executor=torchrun", "run.executor.ntasks_per_node=2"]], ids=["called", "torchrun"]
)
def test_and_so_does_nemo_run_s_command_line(executor: list[str], folder: Path, expected: list[float]) -> None:
    name = "nemo-torchrun" if executor else "nemo"
    factory = f"mixtral_tiny(name='{name}',dir='{folder}/runs',num_gpus_per_node=2)"
    changes = [f"{path}={value}" for path, value in CHANGES.items()]
    nemo = str(Path(sys.executable).with_name("nemo"))
    done = ran([nemo, "llm", "finetune", "--factory", factory, "-y", *executor, *changes], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder / "runs" / name) == expected


@pytest.mark.parametrize("way", ["plain", "experiment"])
def test_a_failing_rank_s_error_is_the_script_s(way: str, folder: Path, expected: list[float]) -> None:
    done = ran(script(folder, way, f"{way}-failing", FAILING), folder)
    assert done.returncode not in (0, 75), done.stdout + done.stderr
    assert "ValueError: told to fail" in done.stderr.splitlines()[-1]
    assert runs_list(folder)[f"{way}-failing"]["state"] == "failed"


@pytest.mark.parametrize("way", ["plain", "experiment"])
def test_ctrl_c_saves_and_ends_with_75(way: str, folder: Path, expected: list[float]) -> None:
    name = f"{way}-stopped"
    metrics = folder / "runs" / name / "metrics.jsonl"
    with subprocess.Popen(
        script(folder, way, name, LONG), cwd=folder, env=environment(folder), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 480
        while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 75, said
    assert "Ctrl-C: saving after this step" in said or way == "experiment", said
    assert list((folder / "runs" / name / "checkpoints").glob(f"{name}-*")), said
    assert runs_list(folder)[name]["state"] == "preempted"


def test_one_device_trains_in_the_script_s_own_process(folder: Path, expected: list[float]) -> None:
    alone = (
        "recipe = llm.mixtral_tiny.finetune_recipe(name='alone', dir='runs', num_gpus_per_node=1)\n"
        "recipe.trainer.max_steps = 1\nrecipe.trainer.callbacks = None\n"
        "recipe.data.global_batch_size = recipe.data.micro_batch_size = 4\n"
    )
    done = ran(script(folder, "direct", "alone", alone), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "runs" / "alone" / "result.json").read_text())
    assert (result["world_size"], result["expert_model_parallel_size"]) == (1, 1)
    record = runs_list(folder)["alone"]
    assert (record["executor"], record["state"]) == ("direct", "succeeded")


def test_validation_starts_ranks_too(folder: Path, expected: list[float]) -> None:
    validate = (
        "parts = {name: fdl.build(part) for name, part in fdl.ordered_arguments(recipe).items()}\n"
        "parts['model_transform'] = parts.pop('peft')  # NeMo's name for it in validate\n"
        "import json\nfound = json.loads((llm.validate(**parts) / 'validation.json').read_text())\n"
        "print(f\"loss {found['val_loss']!r} at {found['step']}\")\n"
    )
    (folder / "validate.py").write_text(
        RECIPE.replace("NAME", "local").replace("Mine,", "llm.SquadDataModule,") + validate
    )
    done = ran([sys.executable, "validate.py"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = json.loads((folder / "runs" / "local" / "result.json").read_text())
    assert done.stdout.splitlines()[-1] == f"loss {trained['val_loss']!r} at {STEPS}"
    assert runs_list(folder)["local-validate"]["state"] == "succeeded"
