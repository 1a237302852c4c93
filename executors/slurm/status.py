"""Ask Slurm about jobs, and say "unknown" rather than guess. Standard library only.

``sacct`` is optional: without accounting, ``squeue`` knows running and recent jobs, and the job's own history
(``attempts.jsonl``, written by the sbatch script) knows how it ended.
"""

import contextlib
import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.system.json_files import parse_object
from mixtral_recipes.system.schema import fits

#: Slurm's long state names to ours.
STATES = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending", "SPECIAL_EXIT": "pending", "RESV_DEL_HOLD": "pending",
    "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running", "SIGNALING": "running",
    "STAGE_OUT": "running", "RESIZING": "running",
    "COMPLETED": "succeeded", "CANCELLED": "cancelled", "PREEMPTED": "preempted",
    "FAILED": "failed", "TIMEOUT": "failed", "NODE_FAIL": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed",
    "DEADLINE": "failed", "REVOKED": "failed",
}  # fmt: skip
FINAL = ("succeeded", "failed", "cancelled", "preempted")
_JOB_ID = re.compile(r"\d+(_\d+)?")
_TIMEOUT_S = 20


@dataclasses.dataclass
class JobState:
    """One job, as reported by Slurm or by its own history."""

    state: str  # pending | running | succeeded | failed | cancelled | preempted | unknown
    source: str  # squeue | sacct | history | nobody
    detail: str = ""  # Slurm's own word and reason


FORGOTTEN = JobState("unknown", "nobody", "Slurm no longer knows this job")


class _Event(TypedDict):
    """A line of the job's own history, as the sbatch script writes it."""

    outcome: str
    exit_code: int
    job_id: NotRequired[str]
    final: NotRequired[bool]


def query(job_ids: list[str], *, ssh: str = "") -> dict[str, JobState]:
    """States of these jobs. A job is "unknown" when Slurm's controller does not answer or has forgotten it."""
    ids = [job_id for job_id in job_ids if _JOB_ID.fullmatch(job_id)]
    states = {job_id: JobState("unknown", "nobody", "not a job id") for job_id in job_ids}
    if not ids:
        return states
    away, found = _squeue(ids, ssh)
    missing = [job_id for job_id in ids if job_id not in found]
    if not away and missing:
        found |= _sacct(missing, ssh)
    unknown = JobState("unknown", "nobody", away) if away else FORGOTTEN
    return states | {job_id: found.get(job_id, unknown) for job_id in ids}


def history(job_dir: str) -> list[dict[str, Any]]:
    """The job's own record of its attempts, oldest first."""
    events = []
    for path in sorted(
        Path(job_dir).glob("attempts*.jsonl"), key=lambda path: (path.name == "attempts.jsonl", path.name)
    ):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                event = parse_object(line)
                if fits(event, _Event):
                    events.append(event)
    return events


def from_history(job_dir: str, job_id: str) -> JobState | None:
    """How the job ended, by its own account; None if not recorded yet (a resumed run's earlier job does not count)."""
    events = history(job_dir)
    last = events[-1] if events and events[-1].get("job_id") == job_id else {}
    if last.get("final") and last.get("outcome") in FINAL:
        return JobState(last["outcome"], "history", f"exit code {last['exit_code']}")
    return None


def cancel(job_id: str, *, ssh: str = "") -> None:
    """Cancel a job.

    Raises:
        LaunchError: Slurm did not accept the request.
    """
    done = slurm(["scancel", job_id], ssh)
    if done.returncode != 0:
        raise LaunchError(f"job {job_id} was not cancelled: {one_line(done.stderr) or 'Slurm does not answer'}.")


def slurm(command: list[str], ssh: str = "", stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one Slurm command, here or on the login node; a missing program or a timeout is a non-zero return code."""
    if ssh:
        done = login.run(ssh, shlex.join(command), stdin=stdin.encode())
        said, error = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(command, done.returncode, said, error)
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} gave no answer within {_TIMEOUT_S} s")


def one_line(text: str) -> str:
    """The last line of a message, without the program's ``error:`` prefixes."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^(\w+: )?(error: )?", "", lines[-1]).rstrip(".") if lines else ""


def _squeue(ids: list[str], ssh: str) -> tuple[str, dict[str, JobState]]:
    """Why there is no answer, or an empty text; and the jobs the controller still knows."""
    done = slurm(["squeue", "--noheader", "--states=all", "--jobs", ",".join(ids), "--format=%i|%T|%r"], ssh)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return "", {}
        return "Slurm's controller does not answer" if done.returncode == 1 else one_line(done.stderr), {}
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, reason = [*line.split("|"), "", ""][:3]
        detail = state if reason in ("None", "") else f"{state} ({reason})"
        found[job_id.strip()] = JobState(STATES.get(state, "unknown"), "squeue", detail)
    return "", found


def _sacct(ids: list[str], ssh: str) -> dict[str, JobState]:
    """Finished jobs from accounting; nothing where there is no accounting."""
    done = slurm(
        ["sacct", "--noheader", "--parsable2", "-X", "--jobs", ",".join(ids), "--format=JobID,State,ExitCode"], ssh
    )
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        job_id, state, code = [*line.split("|"), "", ""][:3]
        word = state.split(" ")[0].rstrip("+")  # "CANCELLED by 1000"
        found[job_id] = JobState(STATES.get(word, "unknown"), "sacct", f"{state}, exit code {code}")
    return found
