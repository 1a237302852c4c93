"""The state of runs, and how to follow, cancel and resume them. Imports neither torch nor nemo_run."""

import contextlib
import os
import re
import signal
import sys
import time
from typing import Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.records import RunRecord
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm import status as slurm_status
from mixtral_recipes.executors.slurm.sbatch import secrets_file
from mixtral_recipes.executors.slurm.status import FINAL, JobState
from mixtral_recipes.system.machine import process_start

#: Before a job folder is used again: its old end is forgotten, failures and preemptions are counted afresh, and the
#: secrets, which the last end deleted, come from stdin again.
_PREPARE_AGAIN = """
cd "$1" && rm -f cancelled || exit 1
number=1
while [ -e "$(printf attempts-%03d.jsonl $number)" ]; do number=$((number + 1)); done
[ ! -e attempts.jsonl ] || mv attempts.jsonl "$(printf attempts-%03d.jsonl $number)"
umask 077
rm -f secrets.env
cat > secrets.env
[ -s secrets.env ] || rm -f secrets.env
"""


def states(runs: list[RunRecord]) -> dict[str, JobState]:
    """The state of each run by id. Slurm is asked once for all of them; a final state is remembered."""
    found: dict[str, JobState] = {}
    asked: dict[str, list[RunRecord]] = {}
    for record in runs:
        if record.executor != "slurm":
            found[record.id] = local_state(record)
        elif record.state in FINAL:
            found[record.id] = JobState(record.state, "record")
        else:
            asked.setdefault(record.ssh, []).append(record)
    for ssh, waiting in asked.items():
        jobs = [record.job_id for record in waiting]
        try:
            answers = slurm_status.query(jobs, ssh=ssh)
        except LaunchError as error:  # a record that names no login node says nothing about the others
            answers = {job: JobState("unknown", "nobody", str(error)) for job in jobs}
        for record in waiting:
            state = answers[record.job_id]
            if state == slurm_status.FORGOTTEN:
                fetch(record)
            if state.state == "unknown" or state.source == "sacct":
                state = slurm_status.from_history(record.job_dir, record.job_id) or state
            found[record.id] = state
    for record in runs:
        state = found[record.id].state
        if state in FINAL and state != record.state:
            record.state = state
            with contextlib.suppress(OSError):
                record.save()
    return found


def state(record: RunRecord) -> JobState:
    """The state of one run."""
    return states([record])[record.id]


def local_state(record: RunRecord) -> JobState:
    """State of a run on this machine: its process, then what its ranks recorded."""
    if record.state in FINAL:
        return JobState(record.state, "record")
    if record.host != os.uname().nodename:
        return JobState("unknown", "nobody", f"started on {record.host}; check there")
    if record.pid and process_start(record.pid) == record.pid_start != "":
        return JobState("running", "process", f"pid {record.pid}")
    ends = records.rank_ends(record)
    if len(ends) == record.nodes * record.nproc_per_node and all(end["exit_code"] == 0 for end in ends):
        return JobState("succeeded", "ranks")
    if ends and ends[0]["exit_code"] == 75:
        return JobState("preempted", "ranks")
    return JobState("failed", "ranks", "its process is gone")


def attempts(record: RunRecord) -> dict[str, int]:
    """How often the run started, was preempted, lost a node, failed."""
    outcomes = [event["outcome"] for event in slurm_status.history(record.job_dir)]
    return {
        "attempts": outcomes.count("started"),
        "preemptions": outcomes.count("preempted") + outcomes.count("stopped"),  # stopped: before a rank could save
        "nodes_lost": outcomes.count("node_lost"),
        "failures": outcomes.count("failed"),
    }


def summary(record: RunRecord, state: JobState) -> dict[str, Any]:
    """One run as a JSON object for ``runs list`` and ``runs status``."""
    described: dict[str, Any] = {
        "id": record.id, "name": record.name, "executor": record.executor, "state": state.state, "source": state.source,
        "detail": state.detail, "recipe": record.recipe, "run_dir": record.run_dir, "created": record.created,
        "world_size": record.nodes * record.nproc_per_node,
    }  # fmt: skip
    if record.executor == "slurm":
        described |= {"job_id": record.job_id, "cluster": record.cluster, **attempts(record)}
    if record.stage:
        described |= {"stage": record.stage, "depends_on": record.depends_on}
    return described


def cancel(record: RunRecord) -> None:
    """Stop a run; its ranks get SIGTERM and save.

    Raises:
        LaunchError: it has ended already, runs on another machine, or Slurm did not accept the request.
    """
    now = state(record)
    if now.state in FINAL:
        raise LaunchError(f"run {record.id} has already ended ({now.state}); nothing to cancel.")
    if record.executor != "slurm":
        if now.state != "running":
            raise LaunchError(f"run {record.id} cannot be cancelled from here: {now.detail}.")
        os.kill(record.pid, signal.SIGTERM)  # torchrun passes it on to the ranks
        return
    marker = f"{record.remote_dir if record.ssh else record.job_dir}/cancelled"
    slurm_status.slurm(["touch", marker], record.ssh)  # so that the script does not take the signal for a preemption
    try:
        slurm_status.cancel(record.job_id, ssh=record.ssh)
    except LaunchError:
        slurm_status.slurm(["rm", "-f", marker], record.ssh)
        raise


def resubmit(record: RunRecord) -> str:
    """Submit a Slurm run's own script again, in the same folders; return the new job id.

    Raises:
        LaunchError: it has not ended, or Slurm refuses it.
    """
    now = state(record)
    if now.state not in FINAL:
        raise LaunchError(f"run {record.id} has not ended ({now.state}); cancel it first.")
    folder = record.remote_dir if record.ssh else record.job_dir
    secrets = secrets_file(record.secrets, record.env_file or None)
    prepared = slurm_status.slurm(["bash", "-c", _PREPARE_AGAIN, "bash", folder], record.ssh, stdin=secrets)
    if prepared.returncode != 0:
        raise LaunchError(f"the job folder of {record.id} is gone: {slurm_status.one_line(prepared.stderr)}.")
    done = slurm_status.slurm(["sbatch", "--requeue", "--parsable", f"{folder}/sbatch.sh"], record.ssh)
    match = re.match(r"(\d+)", done.stdout.strip())
    if done.returncode != 0 or not match:
        raise LaunchError(f"sbatch rejected run {record.id}: {slurm_status.one_line(done.stderr)}.")
    record.job_id, record.state, record.created = match.group(1), "submitted", time.time()
    record.save()
    return record.job_id


class Watched:
    """A run that is watched: asked about every second, behind ssh every five; what it waits for is said on stderr."""

    def __init__(self, record: RunRecord) -> None:
        self.record, self._said = record, ""
        self._ask()

    def _ask(self) -> None:
        fetch(self.record)
        self.state, self._asked = state(self.record), time.monotonic()
        if self.state.state in FINAL:
            fetch(self.record)  # what was written meanwhile

    def ended(self) -> bool:
        """Whether it has ended by now."""
        if time.monotonic() - self._asked > (5 if self.record.ssh else 1):
            self._ask()
        said = self.state.detail or self.state.state
        if self.record.executor == "slurm" and self.state.state in ("pending", "unknown") and said != self._said:
            print(f"[slurm] job {self.record.job_id}: {said}", file=sys.stderr, flush=True)
            self._said = said
        return self.state.state in FINAL


def fetch(record: RunRecord) -> str:
    """Bring logs, history and result of a run behind ssh into its local job folder; nothing to do for any other run.

    Returns:
        Why the login node was not reached; an empty text where it was.
    """
    return login.fetch(record.ssh, record.remote_dir, record.job_dir, record.run_dir) if record.ssh else ""


def result(record: RunRecord) -> dict[str, Any] | None:
    """What the run wrote to RUN/result.json; of one behind ssh, as it was fetched."""
    return records.result(record.job_dir if record.ssh else record.run_dir)
