"""A recipe called in a process that no launcher started: as many ranks as it asks for, started from here.

Under NeMo the trainer did this. The call is stored in the run's job folder, torchrun starts ranks that load it, and
what it returned comes back to the caller; or its error does.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError, MixtralRecipesError, Preempted
from mixtral_recipes.executors import error_file
from mixtral_recipes.executors.local import run_processes
from mixtral_recipes.executors.nemo_run_jobs import StartedAlready
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.stored import CALL, load_result, store_call
from mixtral_recipes.system.machine import process_start
from mixtral_recipes.system.ranks import launched, launched_rank, launched_size


def wanted(num_nodes: int, devices: int) -> bool:
    """Whether ranks must be started: this process is not one, and there should be more than one.

    Raises:
        LaunchError: on several nodes, which nothing here can reach.
    """
    if launched() or num_nodes * devices == 1:
        return False
    if num_nodes > 1:
        raise LaunchError(
            f"trainer.num_nodes={num_nodes} is not supported here: this process can only start ranks on its own "
            "machine; use run.run(recipe, executor=run.SlurmExecutor(...)), a command's --executor slurm, or "
            "torchrun on every node."
        )
    return True


def start(call: Callable[[], Any], *, devices: int, name: str, run_dir: Path, recipe: str) -> Any:
    """Call something on new ranks of this machine, and return what it returned on rank 0.

    Args:
        call: What each rank calls; it and what it holds are sent along.
        devices: How many ranks.
        name: The run's name.
        run_dir: The run's folder.
        recipe: What the run's record says is called.

    Raises:
        LaunchError: it cannot be sent, or a rank failed; the message names that rank and its error.
        Preempted: the run was asked to stop, and saved.
    """
    record = records.new(name, run_dir, "local", recipe)
    record.nproc_per_node = devices
    record.job_dir = str(record.path.parent)
    file = Path(record.job_dir, CALL)
    with records.locked(record.run_dir):
        store_call(call, file)
        record.save()
        run_processes(file, record)
    return load_result(file)


@contextlib.contextmanager
def recorded(*, name: str, run_dir: Path, recipe: str) -> Iterator[None]:
    """Keep the record of a run that trains in this process, unless whoever started it keeps one."""
    if "MIXTRAL_RECIPES_ATTEMPT_DIR" in os.environ or launched_rank() != 0:
        yield
        return
    record = records.new(name, run_dir, "direct", recipe)
    record.nproc_per_node, record.state = launched_size(), "running"
    record.pid, record.pid_start = os.getpid(), process_start(os.getpid())
    record.save()
    record.state = "failed"
    held = "MIXTRAL_RECIPES_LOCKED" in os.environ
    try:
        with contextlib.nullcontext() if held else records.locked(record.run_dir):
            yield
        record.state = "succeeded"
    except Preempted:
        record.state = "preempted"
        raise
    finally:
        record.save()


@contextlib.contextmanager
def told_to_scheduler() -> Iterator[None]:
    """Leave an error where nemo_run's scheduler or torchrun, if one started this process, looks for it."""
    try:
        yield
    except StartedAlready:
        raise
    except BaseException as error:
        text = str(error) if isinstance(error, MixtralRecipesError) else f"{type(error).__name__}: {error}"
        if "MIXTRAL_RECIPES_ATTEMPT_DIR" not in os.environ and not records.lost_peer({"error": text}):
            with contextlib.suppress(OSError):
                error_file.write(text, traceback.format_exc(), getattr(error, "exit_code", 1))
        raise
