"""What the sbatch script decides, run as plain bash with played Slurm programs; tests/slurm has the real ones."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.executors.slurm.profile import cluster
from mixtral_recipes.executors.slurm.sbatch import Job, render


class Node:
    """A job folder and a PATH with played programs."""

    def __init__(self, root: Path) -> None:
        self.job_dir, self.bin = root / "job", root / "bin"
        for folder in (self.job_dir / "code", self.bin, root / "venv" / "bin"):
            folder.mkdir(parents=True)
        (root / "venv" / "bin" / "activate").touch()
        self.venv = str(root / "venv")
        self.play("squeue", "echo RUNNING")
        self.play("scontrol", f'echo "$@" >> {root}/scontrol')
        self.calls = root / "scontrol"

    def play(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, srun: str, nodes: int = 1, **settings: Any) -> int:
        """One attempt whose srun is this script; the exit code."""
        self.play("srun", srun)
        site = cluster(venv=self.venv, **settings)
        script = render(Job("job", str(self.job_dir), nodes, 1, ("-m", "module")), site)
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2"}
        env |= {"SLURM_JOB_NODELIST": "mx[0-1]", "SLURM_NNODES": str(nodes)}
        return subprocess.run(["bash", "-c", script], env=env, check=False, capture_output=True, timeout=60).returncode

    def outcomes(self) -> list[tuple[str, bool]]:
        """(outcome, final) of every line that the script wrote, all of them JSON."""
        lines = (self.job_dir / "attempts.jsonl").read_text().splitlines()
        return [(event["outcome"], event["final"]) for event in map(json.loads, lines)]

    def requeued(self) -> int:
        return self.calls.read_text().count("requeue 7") if self.calls.exists() else 0

    def state(self) -> str | None:
        known = slurm_status.from_history(str(self.job_dir), "7")
        return known.state if known else None


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


SAVED = 'touch "$MIXTRAL_RECIPES_ATTEMPT_DIR/preempted"'
STARTED = ("started", False)


def test_success(node: Node) -> None:
    (node.job_dir / "secrets.env").touch()
    assert node.run("exit 0") == 0
    assert node.outcomes() == [STARTED, ("succeeded", True)]
    assert node.state() == "succeeded"
    assert not (node.job_dir / "secrets.env").exists()


def test_saved_ranks_go_back_into_the_queue(node: Node) -> None:
    (node.job_dir / "secrets.env").touch()
    assert node.run(f"{SAVED}; exit 0") == 75
    assert node.outcomes() == [STARTED, ("preempted", False)]
    assert (node.requeued(), node.state()) == (1, None)
    assert (node.job_dir / "secrets.env").exists()
    assert node.run("exit 0") == 0
    assert node.state() == "succeeded"


def test_preemptions_spend_no_retry(node: Node) -> None:
    for _ in range(3):
        node.run(f"{SAVED}; exit 0", retries=1)
    assert node.run("exit 3", retries=1) == 3
    assert node.outcomes()[-1] == ("failed", False)
    assert node.run("exit 3", retries=1) == 3
    assert node.outcomes()[-1] == ("failed", True)
    assert (node.requeued(), node.state()) == (4, "failed")


def test_too_many_preemptions_end_the_job(node: Node) -> None:
    for _ in range(3):
        node.run(f"{SAVED}; exit 0", max_preemptions=2)
    assert [outcome for outcome, final in node.outcomes() if final] == ["failed"]
    assert node.requeued() == 2


def test_cancelled_job_stays_cancelled(node: Node) -> None:
    (node.job_dir / "cancelled").touch()
    node.run(f"{SAVED}; exit 0")
    assert (node.requeued(), node.state()) == (0, "cancelled")


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("COMPLETING None N/A 0", "cancelled"),  # scancel
        ("COMPLETING None 2026-11-30T05:29:49 0", None),  # PreemptMode=CANCEL
        ("COMPLETING None 2026-11-30T05:29:49 1", None),  # PreemptMode=REQUEUE
        ("COMPLETING TimeLimit N/A 0", None),
        ("COMPLETING None N/A 1", None),  # a lost node: Slurm has put the job into the queue
        ("RUNNING None N/A 0", None),  # a signal that leaves time
    ],
)
def test_scancel_is_told_from_what_else_stops_a_job(node: Node, told: str, state: str | None) -> None:
    """What Slurm 22.05 says while a job's processes end; tests/slurm has the real ones."""
    node.play("squeue", f'case "$*" in *RestartCnt*) echo "{told.replace(" ", "     ")}" ;; *) echo COMPLETING ;; esac')
    node.run(f"{SAVED}; exit 0")
    assert (node.requeued(), node.state()) == (0 if state else 1, state)


def test_lost_node_is_no_failure(node: Node) -> None:
    node.run('case "$*" in *--overlap*) exit 1 ;; *) exit 137 ;; esac', nodes=2)
    assert node.outcomes() == [STARTED, ("node_lost", False)]
    assert node.requeued() == 1


def test_failure_on_two_nodes_that_are_there(node: Node) -> None:
    assert node.run('case "$*" in *--overlap*) exit 0 ;; *) exit 4 ;; esac', nodes=2) == 4
    assert (node.outcomes()[-1], node.requeued()) == (("failed", True), 0)


def ranks(*codes: int) -> str:
    """A line of bash that records these exit codes as `mixtral_recipes.executors.rank` does."""
    ends = [json.dumps({"rank": rank, "exit_code": code, "error": ""}, indent=1) for rank, code in enumerate(codes)]
    return "\n".join(f"echo '{end}' > $MIXTRAL_RECIPES_ATTEMPT_DIR/rank-{rank}.json" for rank, end in enumerate(ends))


AGENT_STOPPED = (
    'echo "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15" '
    '> "$MIXTRAL_RECIPES_ATTEMPT_DIR/node-0.log"'
)
ONE_NODE_OF_TWO = 'case "$*" in *--overlap*) exit 0 ;; esac'


def test_signal_after_the_last_step_is_too_late(node: Node) -> None:
    assert node.run(f"{ranks(0, 0)}\n{AGENT_STOPPED}\nexit 1", nodes=2) == 0
    assert (node.outcomes()[-1], node.requeued()) == (("succeeded", True), 0)


@pytest.mark.parametrize("codes", [(), (0,)])
def test_signal_to_torchrun_alone_is_no_failure(node: Node, codes: tuple[int, ...]) -> None:
    node.run(f"{ONE_NODE_OF_TWO}\n{ranks(*codes)}\n{AGENT_STOPPED}\nexit 1", nodes=2)
    assert (node.outcomes()[-1], node.requeued()) == (("stopped", False), 1)


def test_failed_rank_whose_peers_are_stopped_is_a_failure(node: Node) -> None:
    node.run(f"{ONE_NODE_OF_TWO}\n{ranks(1)}\n{AGENT_STOPPED}\nexit 1", nodes=2)
    assert (node.outcomes()[-1], node.requeued()) == (("failed", True), 0)


def test_stopped_before_any_rank_could_save(node: Node) -> None:
    node.run("exit 143")
    assert (node.outcomes()[-1], node.requeued()) == (("stopped", False), 1)
