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
    plain.succeed(record)
    assert plain.result(name)["last_loss"] == expected_loss(30)
    assert runs.attempts(record)["failures"] == 0
    assert len(records.attempt_folders(record)) >= 2
