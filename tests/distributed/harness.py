"""Runs a function on several gloo processes, or a command, forked from one parent which has imported what they need.

Importing it (`preload.py`) takes seconds per process; forking takes milliseconds. The parent is Python's fork server,
not pytest itself: a process in which autograd has run must not be forked.
"""

import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class RankFailed(AssertionError):
    """A rank raised, or did not finish; carries its traceback."""


def launch(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Call a function on every rank of a fresh gloo world.

    Args:
        world_size: Processes.
        function: A module-level function of an importable module; torch.distributed is initialised when it runs.
        *args: Its arguments, the same on every rank; must be picklable.
        timeout: Seconds for all ranks together.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailed: the first rank that raised, with its traceback, or those that did not finish in time.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            work = pickle.dumps((function, args))
            process = context.Process(target=_rank_main, args=(rank, world_size, folder, work, sender), daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks], time.monotonic() + timeout)
        finally:
            for process, _ in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def command(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a ``mixtral-recipes`` command line in a fork that has the libraries already.

    For commands that are tried many times; what a new process imports is tested where one is started.

    Args:
        *words: The command line, without the program's name.
        stdin: What it reads.

    Returns:
        As of ``subprocess.run``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0").write_text(stdin)
        process = _context().Process(target=_command_main, args=(words, dict(os.environ), name))
        process.start()
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = ((folder / n).read_text() for n in "12")
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _command_main(words: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    from mixtral_recipes.cli import main

    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    for number, mode in enumerate(("r", "w", "w")):
        with Path(folder, str(number)).open(mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin = os.fdopen(0)
    sys.argv = ["mixtral-recipes", *words]
    try:
        main.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_ends: dict[Any, int] = {receiver: rank for rank, receiver in enumerate(receivers)}
    while open_ends:
        ready = wait(list(open_ends), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(open_ends.values())} did not finish in time")
        for end in ready:
            rank = open_ends.pop(end)
            try:
                ok, value = pickle.loads(end.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


@functools.cache
def _context() -> ForkServerContext:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    # The fork server is a fresh interpreter: only it shall see these.
    before = dict(os.environ)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [before.get("PYTHONPATH")])]),
    }
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _rank_main(rank: int, world_size: int, folder: str, work: bytes, sender: Connection) -> None:
    import torch

    from mixtral_recipes.cpu import device as cpu_device

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(work)
        if not torch.cuda.is_available():
            cpu_device.activate()
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    # Without the interpreter's end: gloo's threads and Megatron's atexit hooks have nothing left to save.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
