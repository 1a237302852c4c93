"""Jobs that are stopped from outside and come back by themselves."""

import pytest
from slurm_job import expected_loss
from slurm_site import Site, need, started

from mixtral_recipes.executors import records, runs


def test_time_limit_and_lost_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """More work than a two-minute limit allows, then a lost node: all end at the uninterrupted run's loss."""
    need()
    with started(tmp_path_factory.mktemp("comeback"), accounting=False) as site:
        limited = site.submit("limited", steps=130, step_s=1.0, settings={"time": "2", "grace_s": 25})
        assert site.wait(limited) == "succeeded"
        assert site.result("limited")["last_loss"] == expected_loss(130)
        counts = runs.attempts(limited)
        assert counts["preemptions"] >= 1
        assert counts["failures"] == 0
        assert counts["attempts"] == counts["preemptions"] + 1
        for node in ("mx1", "mx0"):
            lose(site, node)


def lose(site: Site, node: str) -> None:
    """Kill a node with its ranks while a job runs on it, bring it back, and see the job finish."""
    name = f"lost-{node}"
    record = site.submit(name, steps=30, step_s=0.5)
    site.wait_for_step(name, 4)
    site.cluster.kill_node(node)
    site.wait(record, "pending")
    site.cluster.start_node(node)
    assert site.wait(record) == "succeeded"
    assert site.result(name)["last_loss"] == expected_loss(30)
    assert runs.attempts(record)["failures"] == 0
    assert len(records.attempt_folders(record)) >= 2
