"""What is known about a run without asking anyone: its record, its lock and how each rank ended.

A record is ``<home>/runs/<id>/run.json``. A rank's end is ``<job folder>/attempts/<n>/rank-<r>.json``, written by
``mixtral_recipes.executors.rank`` on whatever node it ran. Nothing heavy is loaded: ``runs list`` reads these.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import time
import warnings
from pathlib import Path
from typing import Any, TypedDict

from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning, nearest
from mixtral_recipes.executors.names import check_name
from mixtral_recipes.system.files import private_folder, read_json, write_json
from mixtral_recipes.system.home import runs_home
from mixtral_recipes.system.locks import held_or_refused
from mixtral_recipes.system.schema import Count, Moment, fits, typed

_LOST_PEER = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|socket closed|remote process exited|"
    r"ncclRemoteError|remote worker",
    re.IGNORECASE,
)


@dataclasses.dataclass
class RunRecord:
    """One launched run, local or Slurm."""

    id: str
    name: str
    executor: str  # direct | local | slurm
    run_dir: str
    created: Moment
    recipe: str = ""
    job_dir: str = ""  # where attempts/, configs/ and logs are
    nodes: Count = 1
    nproc_per_node: Count = 1
    job_id: str = ""  # Slurm job id
    pid: Count = 0  # the torchrun agent of a local run
    pid_start: str = ""  # its start time, so that a reused pid is not taken for it
    host: str = ""
    cluster: str = ""  # profile name
    ssh: str = ""  # login.address when Slurm is reached through a tunnel
    remote_dir: str = ""  # job_dir over there
    state: str = "submitted"  # the last state this machine saw
    logs: list[str] = dataclasses.field(default_factory=list)  # the agent's stdout and stderr (local)
    secrets: list[str] = dataclasses.field(default_factory=list)  # names only
    env_file: str = ""  # its name only
    pipeline: str = ""
    stage: str = ""  # of the pipeline
    depends_on: list[str] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path:
        """The record's file."""
        return runs_home() / self.id / "run.json"

    def save(self) -> None:
        """Write the record, 0600, atomically."""
        private_folder(self.path.parent)
        write_json(self.path, dataclasses.asdict(self), private=True)


class _RankEnd(TypedDict):
    """How a rank ended, as it wrote it down."""

    rank: Count
    host: str
    exit_code: int
    error: str
    traceback: str
    time: Moment


def new_id(name: str) -> str:
    """A unique id: the checked name and six random hex digits."""
    return f"{check_name(name)}-{secrets.token_hex(3)}"


def new(name: str, run_dir: Path, executor: str, recipe: str) -> RunRecord:
    """The record of a run that starts now on this machine, under a new id.

    Args:
        name: The run's name; one from Python may hold what an id may not.
        run_dir: The run's folder.
        executor: direct, local or slurm.
        recipe: What is called.
    """
    plain = re.sub(r"\.\.+|[^A-Za-z0-9._-]+", "-", name).strip("-_.")[:64] or "run"
    return RunRecord(
        id=new_id(plain), name=name, executor=executor, run_dir=str(Path(run_dir).absolute()), created=time.time(),
        recipe=recipe, host=os.uname().nodename,
    )  # fmt: skip


def all_records() -> list[RunRecord]:
    """Every record, newest first; one that is damaged is told of and left out."""
    records = []
    for path in runs_home().glob("*/run.json"):
        value = read_json(path) or {}
        try:
            if value.get("id") != path.parent.name:
                raise LaunchError(f"{path} is not this run's record, or is damaged; remove its folder.")
            records.append(typed(value, RunRecord, path, LaunchError))
        except LaunchError as error:
            warnings.warn(f"skipping a run: {error}", MixtralRecipesWarning, stacklevel=2)
    return sorted(records, key=lambda record: record.created, reverse=True)


def find(run_id: str) -> RunRecord:
    """The record with this id or Slurm job id, or the newest with this name or run folder.

    Raises:
        LaunchError: nothing matches; the message lists close names.
    """
    return find_all(run_id)[0]


def find_all(run_id: str) -> list[RunRecord]:
    """As `find`: all records with this id, else with this name, else with this run folder, the newest first."""
    records = all_records()
    folder = Path(run_id).expanduser().absolute()
    for matches in (
        lambda record: run_id in (record.id, record.job_id),
        lambda record: run_id == record.name,
        lambda record: folder == Path(record.run_dir),
    ):
        if found := [record for record in records if matches(record)]:
            return found
    raise LaunchError(f"no run {run_id!r}.{_close(run_id, [record.name for record in records])}")


def newest_in(run_dir: Path, since: float) -> RunRecord | None:
    """The newest record of a run folder that was made at or after ``since``."""
    folder = str(Path(run_dir).absolute())
    return next((record for record in all_records() if record.run_dir == folder and record.created >= since), None)


def run_folder(text: str) -> Path:
    """The folder of a run: one that exists, that of a run `find` knows, or one in ``runs``, where runs go by default.

    Raises:
        LaunchError: it is none of these (the message lists close names), or the run's folder is gone.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    try:
        record = find(text)
    except LaunchError:
        pass
    else:
        if record.ssh:
            node = record.ssh.partition("#")[0]
            raise LaunchError(
                f"run {record.id} is in {record.run_dir} on {node}: pass that folder to a job there; for anything "
                "else, copy it here or work there."
            )
        if not Path(record.run_dir).is_dir():
            raise LaunchError(
                f"run {record.id} has no folder at {record.run_dir}; if it was moved, pass the new folder."
            )
        return Path(record.run_dir)
    started_here = {folder.name: folder for folder in Path("runs").absolute().glob("*/")}
    if text in started_here:
        return started_here[text]
    names = [record.name for record in all_records()]
    raise LaunchError(f"no folder or run {text!r}.{_close(text, [*names, *started_here])}")


def _close(name: str, known: list[str]) -> str:
    return f"{nearest(name, sorted(set(known))) if known else ''} See `mixtral-recipes runs list`."


def attempt_folders(record: RunRecord) -> list[Path]:
    """attempts/0, attempts/1, ... of a run, oldest first."""
    if not record.job_dir:
        return []
    folders = [path for path in Path(record.job_dir, "attempts").glob("*") if path.name.isdecimal()]
    return sorted(folders, key=lambda path: int(path.name))


def rank_ends(record: RunRecord) -> list[dict[str, Any]]:
    """How the ranks of the last attempt ended: failures first, starting with the one that caused the others.

    A rank that only lost its connection to another one comes after every rank with an error of its own, and after one
    that was asked to stop: it may have been the first to leave.
    """
    files = [path for attempt in attempt_folders(record)[-1:] for path in attempt.glob("rank-*.json")]
    ends = [value for path in files if (value := read_json(path)) and fits(value, _RankEnd)]
    return sorted(ends, key=lambda end: (_blame(end), end["time"], end["rank"]))


def _blame(end: dict[str, Any]) -> int:
    if end["exit_code"] in (0, 75):
        return 1 if end["exit_code"] else 3
    return 2 if lost_peer(end) else 0


def lost_peer(end: dict[str, Any]) -> bool:
    """Whether a rank failed only because another one was gone."""
    return bool(_LOST_PEER.search(end.get("error", "")))


def result(run_dir: str | Path, since: float = 0.0) -> dict[str, Any] | None:
    """RUN/result.json, if it was written at or after ``since``."""
    path = Path(run_dir) / "result.json"
    try:
        if path.stat().st_mtime < since:
            return None
    except OSError:
        return None
    return read_json(path)


def finished(run_dir: str | Path, max_steps: int, resume: Any) -> dict[str, Any] | None:
    """RUN/result.json of a run that made all its steps, and whose last checkpoint is whole; None of any other.

    Args:
        run_dir: The run's folder.
        max_steps: How many steps are requested.
        resume: An AutoResume, or a config of one; a run that should start over is ignored.
    """
    from mixtral_recipes.checkpoints.format.integrity import damage_of

    if not resume.resume_if_exists or resume.resume_from_path is not None:
        return None
    found = result(run_dir) or {}
    steps, checkpoint = found.get("steps"), found.get("checkpoint")
    if not isinstance(steps, int) or not isinstance(checkpoint, str) or steps < max_steps:
        return None
    return found if damage_of(Path(checkpoint), hashes=False) is None else None


def asked_file(run_dir: str | Path) -> Path:
    """RUN/asked.json: the settings a run was last started with."""
    return Path(run_dir) / "asked.json"


def asked(run_dir: str | Path) -> dict[str, Any] | None:
    """What RUN/asked.json holds; None without that file, as in a run of an earlier release."""
    return read_json(asked_file(run_dir))


def locked(run_dir: str | Path) -> contextlib.AbstractContextManager[None]:
    """Hold RUN/.lock, so that two runs never write into one folder.

    Raises:
        LaunchError: another process holds it.
    """
    return held_or_refused(Path(run_dir), f"run folder {run_dir} is in use by another run")
