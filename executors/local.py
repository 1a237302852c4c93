"""Start the processes of a job on this machine: torchrun, N processes, rank 0's lines plain, everything in files."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mixtral_recipes.errors import LaunchError, Preempted
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.logs import of_rank
from mixtral_recipes.executors.stored import RANK_MODULE
from mixtral_recipes.system.files import private_folder
from mixtral_recipes.system.machine import children, cores, process_start
from mixtral_recipes.training.guards.signals import CTRL_C, stops_handled_by

_SHUTDOWN_S = 300  # ranks may take this long to save after SIGTERM; torchrun's default of 30 s kills a large save


def command(processes: int, file: Path) -> list[str]:
    """What starts the processes of a stored job: torchrun on a free loopback port, or one rank by itself.

    The interpreter is the one that runs now; no PATH is searched.

    Args:
        processes: How many.
        file: The job, as `stored` wrote it.

    Raises:
        LaunchError: fewer than one process.
    """
    if processes < 1:
        raise LaunchError(f"{processes} processes would start nothing; use 1 or more.")
    rank = ["-m", RANK_MODULE, str(file)]
    if processes == 1:
        return [sys.executable, *rank]
    return [*torchrun(processes), "--tee=3", *rank]


def torchrun(processes: int) -> list[str]:
    """torchrun on this machine, on a free loopback port; what it should run is appended."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"]
    return [*program, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]


def run_processes(file: Path, record: records.RunRecord) -> None:
    """Start a stored job's processes, show rank 0's lines until they end, and raise if any rank failed.

    Args:
        file: The job, as `stored` wrote it.
        record: The run; it says how many processes, and where attempts and logs go.

    Raises:
        LaunchError: a rank failed; the message names it and its error.
        Preempted: the job was asked to stop, and saved what it had trained.
    """
    attempt = private_folder(Path(record.job_dir, "attempts", "0"))
    logs = (attempt / "stdout.log", attempt / "stderr.log")
    arguments = command(record.nproc_per_node, file)
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(open(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), "wb")) for log in logs)
        # in a session of its own: Ctrl-C reaches it through us only, and once; with the run folder's lock: it goes on
        # if we are killed
        agent = subprocess.Popen(
            arguments, env=_environment(record.nproc_per_node, attempt), stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, start_new_session=True, close_fds=False,
        )  # fmt: skip
    with _forwarded_signals(agent) as passed_on, _shown(logs, prefixed=record.nproc_per_node > 1):
        record.pid, record.pid_start, record.state = agent.pid, process_start(agent.pid), "running"
        record.logs = [str(path) for path in logs]
        try:
            record.save()
        finally:
            exit_code = agent.wait()
    record.state = "succeeded" if exit_code == 0 else "failed"
    try:
        raise_for_ranks(record, exit_code, stopped=set(passed_on) == {signal.SIGTERM})
    except Preempted:
        record.state = "preempted"
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk changes nothing about how the run ended
            record.save()


def environment(processes: int, logs: Path) -> dict[str, str]:
    """The environment of processes on this machine: ours, less what would tell torchrun to do something else.

    Args:
        processes: How many.
        logs: torchrun's --log-dir: one stdout.log and stderr.log per rank.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    own = {"LOGLEVEL": "WARNING", "PET_LOG_DIR": str(logs)}
    return {"OMP_NUM_THREADS": str(max(1, cores() // processes)), "PYTHONUNBUFFERED": "1"} | kept | own


def _environment(processes: int, attempt: Path) -> dict[str, str]:
    """The environment of a job's processes."""
    return environment(processes, attempt / "torchrun") | {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
        "MIXTRAL_RECIPES_ATTEMPT_DIR": str(attempt),
        "MIXTRAL_RECIPES_LOCKED": "1",
    }


def raise_for_ranks(record: records.RunRecord, exit_code: int, *, stopped: bool = False) -> None:
    """Turn the ranks' recorded ends and the launcher's exit code into an exception, or return if all is well.

    Args:
        record: The run.
        exit_code: The launcher's.
        stopped: Whether the launcher was asked to stop: a rank that has only just started leaves no report then.

    Raises:
        LaunchError: with the failed rank and its error.
        Preempted: every rank that ended early saved first, or had nothing to save yet.
    """
    attempts = records.attempt_folders(record)
    if exit_code == 0 and not (attempts and (attempts[-1] / "preempted").exists()):
        return
    ends = records.rank_ends(record)
    failed = [end for end in ends if end["exit_code"] not in (0, Preempted.exit_code)]
    resume = f"(`mixtral-recipes runs resume {record.id}`)"
    if ends and ends[0]["exit_code"] == Preempted.exit_code:
        raise Preempted(f"{record.name}: {ends[0]['error']} {resume}")
    if not ends and (stopped or exit_code in (-signal.SIGTERM, Preempted.exit_code)):
        said = "was asked to stop, and ended without saying whether it saved"
        raise Preempted(f"{record.name} {said}; run the same command again {resume}")
    silent = sorted(set(range(record.nodes * record.nproc_per_node)) - {end["rank"] for end in ends})
    if stopped and not failed and not silent:
        raise Preempted(f"{record.name} was asked to stop after all its processes had done their work {resume}")
    see = f"see `mixtral-recipes runs logs {record.id}`"
    if failed and not (silent and records.lost_peer(failed[0])):
        raise LaunchError(f"rank {failed[0]['rank']} failed: {failed[0]['error']} ({see})")
    who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}" if silent else "the job"
    raise LaunchError(
        f"{who} ended without a report (exit code {exit_code}): killed from outside, out of memory, "
        f"or never started; {see}."
    )


@contextlib.contextmanager
def _forwarded_signals(agent: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Pass Ctrl-C, SIGTERM, SIGUSR1 and a lost terminal on as SIGTERM, so that the ranks save; a second Ctrl-C kills.

    Yields what was passed on.
    """
    passed_on: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        kill = bool(passed_on) and number == signal.SIGINT
        passed = signal.SIGKILL if kill else signal.SIGTERM
        passed_on.append(passed)
        if number == signal.SIGINT and not kill:
            os.write(2, CTRL_C.encode())
        # torchrun starts the ranks in sessions of their own and passes SIGTERM on to them, but cannot pass on SIGKILL
        for pid in [*(children(agent.pid) if kill else ()), agent.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, passed)

    with stops_handled_by(forward):
        yield passed_on


@contextlib.contextmanager
def _shown(logs: tuple[Path, Path], *, prefixed: bool) -> Iterator[None]:
    """Copy rank 0's lines to this process's stdout and stderr until the block ends, then whatever is left."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=_copy, args=(path, stream, stop.is_set, prefixed), daemon=True)
        for path, stream in zip(logs, (sys.stdout, sys.stderr), strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)


def _copy(path: Path, stream: TextIO, stopped: Callable[[], bool], prefixed: bool) -> None:
    """Follow one log file; lines of other ranks and torchrun's own report of a failure are left in the file.

    Where the stream is full or its reader has gone, all lines are left there: the job goes on.
    """
    with contextlib.suppress(OSError):
        _follow(path, stream, stopped, prefixed)


def _follow(path: Path, stream: TextIO, stopped: Callable[[], bool], prefixed: bool) -> None:
    rest = ""
    with path.open(errors="replace") as file:
        while True:
            last = stopped()  # asked before reading: what was written before the end is still read
            rest += file.read()
            *lines, rest = rest.split("\n")
            for line in lines:
                text = of_rank(line, 0) if prefixed else line
                if text is not None:
                    print(text, file=stream)
            if lines:
                stream.flush()
            if last:
                return
            time.sleep(0.05)
