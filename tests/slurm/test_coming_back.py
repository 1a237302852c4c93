"""Jobs that are stopped from outside and come back by themselves."""

import json
import time

import pytest
from slurm_job import expected_loss
from slurm_site import Site

from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs


@pytest.mark.parametrize("node", ["mx1", "mx0"])
def test_lost_node(plain: Site, node: str) -> None:
    """A node is killed with its ranks (mx0 also runs the batch script): the job goes on when it is back."""
    name = f"lost-{node}"
    record = plain.submit(name, steps=30, step_s=0.5)
    plain.wait_for_step(name, 4)
    plain.cluster.kill_node(node)
    plain.wait(record, "pending")
    plain.cluster.start_node(node)
    plain.succeed(record)
    assert plain.result(name)["last_loss"] == expected_loss(30)
    assert runs.attempts(record)["failures"] == 0
    assert len(records.attempt_folders(record)) >= 2


@pytest.mark.parametrize("partition", ["requeued", "ended"])
def test_preempted(plain: Site, partition: str) -> None:
    """An urgent job takes both nodes, and this one is put back into the queue, or ended, by Slurm itself."""
    name = f"preempted-{partition}"
    record = plain.submit(name, steps=30, step_s=0.5, settings={"partition": partition})
    plain.wait_for_step(name, 4)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    plain.cluster.run("sbatch", *urgent)
    plain.succeed(record)
    assert plain.result(name)["last_loss"] == expected_loss(30)
    counts = runs.attempts(record)
    assert (counts["preemptions"], counts["failures"]) == (1, 0)


def test_scancel(plain: Site) -> None:
    """A job that is ended with Slurm's own command stays ended, in an attempt after the first too."""
    record = plain.submit("scancel", steps=100_000, step_s=0.5)
    plain.wait_for_step("scancel", 2)
    plain.cluster.run("scancel", "--signal=TERM", record.job_id)
    plain.wait(record, "pending")
    step = json.loads((plain.runs / "scancel" / "state.json").read_text())[0]
    plain.wait_for_step("scancel", step + 1)
    plain.cluster.run("scancel", record.job_id)
    assert plain.wait(record) == "cancelled"
    end = time.monotonic() + 120
    while runs.slurm_status.from_history(record.job_dir, record.job_id) is None and time.monotonic() < end:
        time.sleep(0.3)  # Slurm says CANCELLED while the ranks still save
    recorded = runs.slurm_status.from_history(record.job_dir, record.job_id)
    assert recorded is not None
    assert recorded.state == "cancelled"
    assert runs.attempts(record)["attempts"] == 2
