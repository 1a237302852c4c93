"""What nemo_run's LocalExecutor leaves to its users, done for our tasks.

It starts ``python`` from PATH, which may be another one; it starts nothing where SLURM_PROCID is not 0, as in a shell
inside an allocation; a script whose job failed ends with 0; Ctrl-C does not reach the job; and the job's process loads
the script to find its classes, which starts the job again unless ``if __name__ == "__main__"`` stands in the way.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError, Preempted, RecipeError, advice_for_scripts
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.settings.objects import as_configs
from mixtral_recipes.system import imports

_SCRIPT = "__external_main__"  # the name under which nemo_run loads a script in the job's process


class StartedAlready(LaunchError):
    """A script that is only loaded starts its run."""


def activate() -> None:
    """Change nemo_run's local jobs, once: now, or as soon as a script imports nemo_run."""
    experiments = sys.modules.get("nemo_run.run.experiment")
    if experiments is None:
        imports.around(_then_changed, "nemo_run")
        return
    if hasattr(experiments.Experiment.run, "__wrapped__"):
        return
    importlib.import_module("mixtral_recipes.settings.serialization")  # teaches nemo_run what recipes hold
    executor, experiment = experiments.LocalExecutor, experiments.Experiment
    executor.assign = _with_this_python(executor.assign)
    experiment.__init__ = _once(experiment.__init__)
    experiment.add = _checked(experiment.add)
    experiment.run = _single_node(experiment.run)
    experiment._wait_for_jobs = _told(experiment._wait_for_jobs)


@contextlib.contextmanager
def _then_changed() -> Iterator[None]:
    yield
    activate()


def refuse_while_loading() -> None:
    """Stop a script that starts a run while nemo_run only loads it to find its classes.

    What it has defined by then is put where nemo_run looks for it.

    Raises:
        StartedAlready: nemo_run logs it, and goes on with the job.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _SCRIPT and frame.f_code.co_name == "<module>":
            for name, value in frame.f_globals.items():
                if not name.startswith("__"):
                    setattr(sys.modules["__main__"], name, value)
            raise StartedAlready("this script's runs are not started again in their own process.")
        frame = frame.f_back


def _once(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_while_loading()
        init(self, *args, **kwargs)

    return made


def _with_this_python(assign: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(assign)
    def assigned(self: Any, *args: Any, **kwargs: Any) -> None:
        assign(self, *args, **kwargs)
        self.env_vars.setdefault("PATH", str(Path(sys.executable).parent))  # the scheduler puts it before ours

    return assigned


def _checked(add: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a recipe that cannot run when it is added, before a dry run or a queue."""

    @functools.wraps(add)
    def added(self: Any, task: Any, executor: Any = None, *args: Any, **kwargs: Any) -> Any:
        with advice_for_scripts():
            tasks = task if isinstance(task, list) else [task]
            given = [_as_text(each) if _is_ours(each) else each for each in tasks]
            for recipe in filter(_trains, given):
                preflight(recipe, None, elsewhere=_elsewhere(executor or self.executor))
        return add(self, given if isinstance(task, list) else given[0], executor, *args, **kwargs)

    return added


def _as_text(recipe: Any) -> Any:
    """A recipe in the shape in which nemo_run keeps it.

    Raises:
        RecipeError: an object in it cannot be kept as text, or a class is in no file; names it.
    """
    from fiddle.experimental.serialization import UnserializableValueError
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = as_configs(recipe)
    _refuse_what_no_file_defines(recipe)
    try:
        ZlibJSONSerializer().serialize(recipe)
    except UnserializableValueError as error:
        place = re.search(r"at path '<root>\.?([^']*)'", str(error))
        raise RecipeError(
            f"recipe.{place[1] if place else ''} holds an object, and nemo_run keeps recipes as text: write "
            "run.Config(CLASS, ...) for CLASS(...)."
        ) from error
    return recipe


def _refuse_what_no_file_defines(recipe: Any) -> None:
    """Refuse classes of a notebook or a prompt: nemo_run sends a script's file along, and there is none."""
    if hasattr(sys.modules["__main__"], "__file__"):
        return
    from fiddle import daglish

    for value, _path in daglish.iterate(recipe):
        target = getattr(value, "__fn_or_cls__", None)
        if target is not None and getattr(target, "__module__", "") == "__main__":
            raise RecipeError(
                f"{target.__name__} is defined in this notebook, where the job's process cannot find it: put it in a "
                "file and import it, or start the recipe from here with run.run(recipe, direct=True)."
            )


def _trains(task: Any) -> bool:
    return _is_ours(task) and task.__fn_or_cls__.__name__ in ("pretrain", "finetune", "train", "validate")


def _is_ours(task: Any) -> bool:
    return getattr(getattr(task, "__fn_or_cls__", None), "__module__", "").startswith("mixtral_recipes.")


def _elsewhere(executor: Any) -> bool:
    """Whether an executor's jobs have other files than this machine."""
    from nemo_run import LocalExecutor, SlurmExecutor
    from nemo_run.core.tunnel.client import SSHTunnel

    if isinstance(executor, list):
        return any(map(_elsewhere, executor))
    if isinstance(executor, SlurmExecutor):
        return bool(executor.container_image) or isinstance(executor.tunnel, SSHTunnel)
    return not isinstance(executor, LocalExecutor)


def _single_node(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def ran(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = os.environ.pop("SLURM_PROCID", None) if all(map(_on_one_machine, self.jobs)) else None
        try:
            return run(self, *args, **kwargs)
        finally:
            if hidden is not None:
                os.environ["SLURM_PROCID"] = hidden

    return ran


def _on_one_machine(job: Any) -> bool:
    from nemo_run import LocalExecutor

    return isinstance(job.executor, LocalExecutor) and job.executor.nnodes() == 1


def _told(wait: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(wait)
    def waited(self: Any, jobs: list[Any]) -> None:
        ours = [job for job in jobs if _on_one_machine(job) and _is_ours(getattr(job, "task", None))]
        with _signals_passed_on(self, ours):
            wait(self, jobs)
        for job in ours:
            _raise_for(self, job)

    return waited


def _raise_for(experiment: Any, job: Any) -> None:
    """Raise what a job ended with.

    Raises:
        LaunchError: it failed.
        Preempted: it was asked to stop, and saved.
    """
    status = experiment._runner.status(job.handle) if job.handle else None
    if status is None or status.state.name == "SUCCEEDED":
        return
    try:
        message = json.loads(status.structured_error_msg)["message"]
        text, code = message["message"], message["extraInfo"].get("exit_code")
    except (ValueError, KeyError, TypeError, AttributeError):  # it ended without a word
        text, code = f"its log is in {job.executor.job_dir}", None
    if code == Preempted.exit_code:
        raise Preempted(text)
    raise LaunchError(f"job {job.id} failed: {text}")


@contextlib.contextmanager
def _signals_passed_on(experiment: Any, jobs: list[Any]) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the jobs, which save at the first and end at once at the second."""
    if not jobs or threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, _frame: Any) -> None:
        for job in jobs:
            for process in _processes(experiment, job):
                if process.poll() is None:
                    process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _processes(experiment: Any, job: Any) -> list[Any]:
    """The processes nemo_run started for a job. It offers no public way to them; a test watches this seam."""
    scheduler, _, app_id = experiment._runner._scheduler_app_id(job.handle, check_session=False)
    return [replica.proc for replicas in scheduler._apps[app_id].role_replicas.values() for replica in replicas]
