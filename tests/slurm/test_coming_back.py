"""Jobs that are stopped from outside and come back by themselves."""

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
    assert plain.wait(record) == "succeeded"
    assert plain.result(name)["last_loss"] == expected_loss(30)
    assert runs.attempts(record)["failures"] == 0
    assert len(records.attempt_folders(record)) >= 2


@pytest.mark.slow
def test_two_minute_limit(plain: Site) -> None:
    """More work than a two-minute limit allows ends at the uninterrupted run's loss."""
    limited = plain.submit("limited", steps=130, step_s=1.0, settings={"time": "2", "grace_s": 25})
    assert plain.wait(limited) == "succeeded"
    assert plain.result("limited")["last_loss"] == expected_loss(130)
    counts = runs.attempts(limited)
    assert counts["preemptions"] >= 1
    assert (counts["failures"], counts["attempts"]) == (0, counts["preemptions"] + 1)
