"""Run a recipe on this machine through nemo_run's LocalExecutor: torchrun, N processes, plain log lines."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mixtral_recipes.errors import LaunchError, Preempted
from mixtral_recipes.executors.names import check_env
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.logs import of_rank
from mixtral_recipes.system.home import jobs_home
from mixtral_recipes.system.machine import children, cores, process_start

if TYPE_CHECKING:
    import subprocess

    import nemo_run as run

_SHUTDOWN_S = 300  # ranks may take this long to save after SIGTERM; torchrun's default of 30 s kills a large save


def threads_per_process(nproc_per_node: int) -> int:
    """OpenMP threads per process: this machine's usable cores divided among the processes."""
    return max(1, cores() // max(1, nproc_per_node))


def local_executor(nproc_per_node: int, *, env: dict[str, str] | None = None) -> "run.LocalExecutor":
    """A LocalExecutor for N processes: torchrun on a free loopback port, or plain Python for one process.

    Args:
        nproc_per_node: Processes to start.
        env: Environment for every process; anything secret belongs in the caller's own environment, which is inherited.

    Raises:
        LaunchError: fewer than one process, or an environment variable that must not be written to job files.
    """
    import nemo_run as run

    if nproc_per_node < 1:
        raise LaunchError(f"nproc_per_node={nproc_per_node} starts nothing; use 1 or more.")
    defaults = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_process(nproc_per_node))),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
        "LOGLEVEL": "WARNING",
        "PATH": os.path.dirname(sys.executable),  # torchx puts it first; torchrun is found without activating the venv
    }
    return run.LocalExecutor(
        ntasks_per_node=nproc_per_node,
        launcher="torchrun" if nproc_per_node > 1 else None,
        env_vars=defaults | check_env(env or {}),
    )


def run_local(task: "run.Script", executor: "run.LocalExecutor", record: records.RunRecord) -> None:
    """Start ``task``, show rank 0's lines until it ends, and raise if any rank failed.

    Raises:
        LaunchError: a rank failed; the message names it and its error.
        Preempted: the job was asked to stop and saved.
    """
    import nemo_run as run

    with run.Experiment(
        record.name, executor=executor, log_level="ERROR", base_dir=str(jobs_home()), clean_mode=True,
        enable_goodbye_message=False, skip_status_at_exit=True, serialize_metadata_for_scripts=False,
    ) as experiment:  # fmt: skip
        experiment.add(task, name=record.name)
        experiment.run()
        agent, logs = _agent(experiment)
        record.pid, record.pid_start, record.state = agent.pid, process_start(agent.pid), "running"
        record.logs = [str(path) for path in logs]
        record.save()
        with _forwarded_signals(agent), _shown(logs, prefixed=executor.nproc_per_node() > 1):
            exit_code = agent.wait()
    record.state = "succeeded" if exit_code == 0 else "failed"
    try:
        raise_for_ranks(record, exit_code)
    except Preempted:
        record.state = "preempted"
        raise
    finally:
        record.save()


def raise_for_ranks(record: records.RunRecord, exit_code: int) -> None:
    """Turn the ranks' recorded ends and the launcher's exit code into an exception, or return if all is well.

    Raises:
        LaunchError: with the failed rank and its error.
        Preempted: every rank that ended early saved first.
    """
    attempts = records.attempt_folders(record)
    if exit_code == 0 and not (attempts and (attempts[-1] / "preempted").exists()):
        return
    ends = records.rank_ends(attempts[-1]) if attempts else []
    failed = [end for end in ends if end["exit_code"] not in (0, Preempted.exit_code)]
    if not failed and ends and ends[0]["exit_code"] == Preempted.exit_code:
        raise Preempted(f"{record.name} was asked to stop and saved; start it again, or `runs resume {record.id}`.")
    silent = sorted(set(range(record.nodes * record.nproc_per_node)) - {end["rank"] for end in ends})
    see = f"see `mixtral-recipes runs logs {record.id}`"
    if failed and not (silent and records.lost_peer(failed[0])):
        raise LaunchError(f"rank {failed[0]['rank']} failed: {failed[0]['error']} ({see})")
    who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}" if silent else "the job"
    raise LaunchError(
        f"{who} ended without a report (exit code {exit_code}): killed from outside, out of memory, "
        f"or never started; {see}."
    )


def _agent(experiment: Any) -> "tuple[subprocess.Popen[bytes], tuple[Path, Path]]":
    """The started process and its log files. nemo_run offers no public way to either; a test watches this seam."""
    scheduler, _, app_id = experiment._runner._scheduler_app_id(experiment.jobs[0].handle, check_session=False)
    ((replica,),) = scheduler._apps[app_id].role_replicas.values()
    return replica.proc, (Path(replica.stdout.name), Path(replica.stderr.name))


@contextlib.contextmanager
def _forwarded_signals(agent: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on as SIGTERM, so that the ranks save; a second Ctrl-C kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0  # signals so far

    def forward(number: int, _frame: Any) -> None:
        nonlocal asked
        asked += 1
        kill = asked > 1 and number == signal.SIGINT
        # torchrun starts the ranks in sessions of their own and passes SIGTERM on to them, but cannot pass on SIGKILL
        for pid in [*(children(agent.pid) if kill else ()), agent.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """Follow one log file; lines of other ranks and torchrun's own report of a failure are left in the file."""
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
