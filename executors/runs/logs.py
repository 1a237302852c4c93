"""Find and read the logs of a run, local or Slurm, all attempts of it. Standard library only."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.records import RunRecord

#: torchrun's prefix: role name and global rank.
_PREFIX = re.compile(r"^\[[a-z_]*(\d+)\]:")


def of_rank(line: str, rank: int | None) -> str | None:
    """The line without torchrun's ``[default0]:`` if this rank wrote it, else None; any line for ``rank=None``."""
    if rank is None:
        return line
    match = _PREFIX.match(line)
    return line[match.end() :] if match and int(match.group(1)) == rank else None


def log_files(record: RunRecord) -> list[tuple[str, Path]]:
    """(attempt, file) of every log, oldest attempt first."""
    if record.executor != "slurm":
        return [("0", Path(path)) for path in record.logs]
    files = [
        (attempt.name, path)
        for attempt in records.attempt_folders(record)
        for path in sorted(attempt.glob("node-*.log"), key=lambda path: int(path.stem.partition("-")[2]))
    ]
    return files + [("batch", path) for path in sorted(Path(record.job_dir).glob("sbatch_*.out"))]


def prefixed(record: RunRecord) -> bool:
    """Whether torchrun put a rank's number before each line; a command, or a single local process, has none."""
    return bool(record.recipe) if record.executor == "slurm" else record.nproc_per_node > 1


def failure(record: RunRecord) -> list[str]:
    """What went wrong in the last attempt, according to the rank that failed first; empty if no rank failed."""
    folders = records.attempt_folders(record)
    ends = records.rank_ends(record)
    if not ends and folders:  # a command that no rank reports for, or a script that did not get that far: its last line
        batch = Path(record.job_dir, f"sbatch_{record.job_id}.out")
        last = _last_line(folders[-1] / "node-0.log") or _last_line(batch)
        return [line.removeprefix("error: ") for line in last if line]
    if not ends or ends[0]["exit_code"] in (0, 75):
        return []
    first = ends[0]
    head = f"rank {first['rank']} on {first['host']} failed first (attempt {folders[-1].name}): {first['error']}"
    return [head, *first["traceback"].rstrip().splitlines(), ""]


def _last_line(path: Path) -> list[str]:
    return path.read_text(errors="replace").strip().splitlines()[-1:] if path.exists() else []


def lines(record: RunRecord, rank: int | None = None) -> Iterator[str]:
    """Every log line so far, each attempt and node under a heading; with ``rank``, that rank's lines only."""
    for attempt, path in log_files(record):
        if rank is not None and (attempt == "batch" or (rank != 0 and not prefixed(record))):
            continue
        content = path.read_text(errors="replace").splitlines() if path.exists() else []
        wanted = [text for line in content if (text := of_rank(line, rank if prefixed(record) else None)) is not None]
        if wanted:
            yield f"== attempt {attempt}: {path.name}" if attempt != "batch" else f"== batch script: {path.name}"
            yield from wanted


def follow(record: RunRecord, rank: int, ended: Callable[[], bool], poll_s: float = 0.2) -> Iterator[str]:
    """One rank's lines as they are written, through every attempt, until ``ended`` and nothing is left to read."""
    places: dict[Path, int] = {}
    while True:
        last = ended()  # asked before reading: what was written before the end is still read
        for attempt, path in log_files(record):
            if attempt == "batch" or not path.exists():
                continue
            start = places.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            complete = data if last else data[: data.rfind(b"\n") + 1]
            places[path] = start + len(complete)
            for line in complete.decode(errors="replace").splitlines():
                text = of_rank(line, rank if prefixed(record) else None)
                if text is not None:
                    yield text
        if last:
            return
        time.sleep(poll_s)
