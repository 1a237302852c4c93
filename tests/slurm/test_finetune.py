"""The real fine-tuning command over two Slurm nodes, expert-parallel across them, against the same job here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import slurm_job
from slurm_site import PATIENCE_S, Site

from mixtral_recipes.executors.launch import launch
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs

FINETUNE = [
    "finetune", "--recipe", "mixtral_tiny", "--peft", "lora", "--no-export", "--json",
    "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1",
]  # fmt: skip
SLURM = [
    "--executor", "slurm", "--account", "none", "--partition", "debug", "--num-nodes", "2", "--num-gpus-per-node", "1",
    "--slurm", "env.OMP_NUM_THREADS=1",
]  # fmt: skip
SHORT, LONG = 4, 16  # steps
LIMIT_S, GRACE_S, STEP_S = 120, 25, 6  # steps that wait reach the limit on any machine, and leave it idle
assert LONG * STEP_S > LIMIT_S - GRACE_S


def command(*arguments: str) -> dict[str, Any]:
    """Run ``mixtral-recipes`` as a user does; the JSON object it ends with."""
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_recipes.cli.main", *arguments],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def train_events(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The events of RUN/metrics.jsonl by step; a step that was done again counts as it was the last time."""
    events = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    by_step = {event["step"]: event for event in events if event["kind"] == "train"}
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    return by_step


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, in order."""
    events = train_events(run_dir)
    return [events[step]["loss"] for step in sorted(events)]


def here(folder: Path, steps: int) -> list[float]:
    """The losses with both ranks on this machine."""
    result = command(
        *FINETUNE, "--num-gpus-per-node", "2", "--dir", str(folder), "--name", "tune", f"trainer.max_steps={steps}"
    )
    assert (result["world_size"], result["expert_model_parallel_size"]) == (2, 2)
    found = losses(folder / "tune")
    assert len(found) == steps
    return found


@pytest.fixture(scope="module")
def short_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return here(tmp_path_factory.mktemp("here"), SHORT)


def test_two_nodes_give_the_losses_of_one_machine(site: Site, short_losses: list[float]) -> None:
    result = command(*FINETUNE, *SLURM, "--dir", str(site.runs), "--name", "tune", f"trainer.max_steps={SHORT}")
    assert (result["world_size"], result["expert_model_parallel_size"]) == (2, 2)
    assert losses(site.runs / "tune") == short_losses
    status = command("runs", "status", result["job_id"], "--json")
    assert (status["state"], status["world_size"], status["attempts"]) == ("succeeded", 2, 1)
    assert {end["host"] for end in records.rank_ends(records.find("tune"))} == {"mx0", "mx1"}


@pytest.fixture(scope="module")
def long_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return here(tmp_path_factory.mktemp("here_too"), LONG)


def submit(site: Site, name: str, step_s: float, save_every: int | None = None, **settings: Any) -> Any:
    """Submit the job of `FINETUNE`, its steps a while longer; the run's record."""
    import nemo_run as run

    import mixtral_recipes as llm

    recipe = llm.mixtral_tiny.finetune_recipe(name=name, dir=str(site.runs), num_nodes=2, num_gpus_per_node=1)
    recipe.trainer.max_steps = LONG
    recipe.trainer.limit_val_batches = 0
    recipe.trainer.log_every_n_steps = 1
    recipe.trainer.callbacks = [run.Config(slurm_job.Wait, seconds=step_s)]
    recipe.log.ckpt.every_n_train_steps = save_every
    launch(recipe, executor=site.executor(**settings), name=name, run_dir=site.runs / name, detach=True)
    return records.find(name)


@pytest.mark.slow
def test_two_minute_limit_leaves_the_losses(plain: Site, long_losses: list[float]) -> None:
    """Stopped before the limit, requeued and resumed until it is done, the run has the losses of one that was not."""
    record = submit(plain, "limited", STEP_S, time=str(LIMIT_S // 60), grace_s=GRACE_S)
    plain.succeed(record)
    counts = runs.attempts(record)
    print(counts)
    assert counts["preemptions"] >= 1
    assert (counts["attempts"], counts["failures"], counts["nodes_lost"]) == (counts["preemptions"] + 1, 0, 0)
    assert losses(plain.runs / "limited") == long_losses


@pytest.mark.slow
def test_lost_node_leaves_the_losses(plain: Site, long_losses: list[float]) -> None:
    """One slurmd is killed with its rank; the job waits for the node and goes on from its last checkpoint."""
    record = submit(plain, "lost", 1, save_every=5)
    plain.wait_for(record, (plain.runs / "lost" / "checkpoints" / "latest").exists, "at its first checkpoint")
    plain.cluster.kill_node("mx1")
    plain.wait(record, "pending")
    plain.cluster.start_node("mx1")
    plain.succeed(record)
    counts = runs.attempts(record)
    print(counts)
    assert (counts["attempts"] >= 2, counts["failures"]) == (True, 0)
    assert losses(plain.runs / "lost") == long_losses
