"""What a user does with jobs, on a cluster with accounting and on one without."""

import json
import time

import pytest
from slurm_job import expected_loss
from slurm_site import Site

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.launch import launch
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs import states as runs


def test_two_nodes_finish(site: Site) -> None:
    record = records.find("good")
    site.succeed(record)
    assert site.result("good") == {"recipe": "job", "steps": 4, "world_size": 2, "last_loss": expected_loss(4)}
    hosts = {end["host"] for end in records.rank_ends(record)}
    assert hosts == {"mx0", "mx1"}
    code, text = site.cli("status", "good", "--json")
    status = json.loads(text.splitlines()[-1])
    assert (code, status["state"], status["attempts"], status["result"]["steps"]) == (0, "succeeded", 1, 4)


def test_logs_of_one_rank(site: Site) -> None:
    site.wait(records.find("good"))
    _, everything = site.cli("logs", "good")
    _, one = site.cli("logs", "good", "--rank", "1")
    _, followed = site.cli("logs", "good", "-f", "--rank", "1")
    assert "rank 0 step 4" in everything
    assert "rank 1 step 4" in one
    assert "rank 0" not in one
    assert [line for line in one.splitlines() if not line.startswith("==")] == followed.splitlines()


def test_failed_ranks_error_comes_first(site: Site) -> None:
    record = records.find("bad")
    assert site.wait(record) == "failed"
    _, text = site.cli("logs", "bad")
    assert text.splitlines()[0].startswith("rank 1 on mx")
    assert text.splitlines()[0].endswith("ValueError: told to fail in rank 1")
    assert text.splitlines()[1].startswith("Traceback")
    assert runs.attempts(record) == {"attempts": 1, "preemptions": 0, "nodes_lost": 0, "failures": 1}


def test_nobody_waits_for_a_step_of_a_job_that_failed(site: Site) -> None:
    with pytest.raises(TimeoutError, match=r"not at step 1:\n(.*\n)*.*told to fail in rank 1"):
        site.wait_for_step("bad", 1)


def test_failure_is_retried(site: Site) -> None:
    record = records.find("flaky")
    site.succeed(record)
    assert runs.attempts(record) == {"attempts": 2, "preemptions": 0, "nodes_lost": 0, "failures": 1}
    _, text = site.cli("logs", "flaky")
    assert "attempt 0" in text
    assert "attempt 1" in text


def test_list_knows_every_state(site: Site) -> None:
    for name in ("good", "bad", "flaky"):
        site.wait(records.find(name))
    _, text = site.cli("list", "--json")
    states = {row["name"]: row["state"] for row in json.loads(text.splitlines()[-1])["runs"]}
    assert states | {"good": "succeeded", "bad": "failed", "flaky": "succeeded"} == states


def test_folder_in_use_is_refused(site: Site) -> None:
    site.wait_for_step("long", 1)
    with pytest.raises(LaunchError, match="belongs to run long-"):
        launch(site.recipe("long"), executor=site.executor(), name="other", run_dir=site.runs / "long", detach=True)


def test_controller_away_is_unknown(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    record = records.find("long")
    site.wait_for_step("long", 1)
    impatient = site.cluster.conf.with_name("impatient.conf")
    impatient.write_text(site.cluster.conf.read_text() + "MessageTimeout=2\n")  # squeue would ask for ten seconds
    site.cluster.stop_controller()
    monkeypatch.setenv("SLURM_CONF", str(impatient))
    try:
        assert runs.state(record).state == "unknown"
        assert runs.state(records.find("good")).state == "succeeded"
        code, _ = site.cli("cancel", "long")
        assert code == 2
    finally:
        monkeypatch.undo()
        site.cluster.start_controller()
    assert site.wait(record, "running") == "running"


def test_cancel_saves_and_resume_goes_on(site: Site) -> None:
    record = records.find("long")
    site.wait_for_step("long", 2)
    code, _ = site.cli("cancel", record.id)
    assert code == 0
    assert site.wait(record) == "cancelled"
    code, _ = site.cli("cancel", record.id)
    assert code == 2
    end = time.monotonic() + 120
    while runs.slurm_status.from_history(record.job_dir, record.job_id) is None and time.monotonic() < end:
        time.sleep(0.3)  # Slurm says CANCELLED while the ranks still save
    _, text = site.cli("logs", record.id, "--rank", "0")
    assert "saved at step" in text
    step = json.loads((site.runs / "long" / "state.json").read_text())[0]
    code, text = site.cli("resume", record.id, "--json")
    assert code == 0
    again = records.find(record.id)
    assert again.job_id == json.loads(text.splitlines()[-1])["job_id"] != record.job_id
    site.wait(again, "running")
    site.wait_for_step("long", step + 1)
    site.cli("cancel", record.id)
    assert site.wait(again) == "cancelled"
