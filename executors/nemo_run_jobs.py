"""What nemo_run's LocalExecutor leaves to its users, done for our tasks.

It starts ``python`` from PATH, which may be another one; it starts nothing where SLURM_PROCID is not 0, as in a shell
inside an allocation; a script whose job failed ends with 0; Ctrl-C does not reach the job; and the job's process loads
the script to find its classes, which starts the job again unless ``if __name__ == "__main__"`` stands in the way. When
a task of a group has ended the others are asked to end, and one that was just ending counts as failed.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import LaunchError, Preempted, RecipeError, advice_for_scripts
from mixtral_recipes.executors.own_modules import with_own_modules
from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.executors.runs import records
from mixtral_recipes.executors.runs.checkpoints import with_start
from mixtral_recipes.executors.slurm.executor import check_files_there, for_recipe, with_full_paths
from mixtral_recipes.executors.slurm.profile import Cluster
from mixtral_recipes.executors.slurm.status import one_line
from mixtral_recipes.executors.submit import complete, forget_secrets
from mixtral_recipes.settings.log import run_folder
from mixtral_recipes.settings.objects import as_configs
from mixtral_recipes.system import imports
from mixtral_recipes.system.files import refuse_unwritable
from mixtral_recipes.system.machine import at_a_prompt
from mixtral_recipes.training.guards.signals import stops_handled_by

_SCRIPT = "__external_main__"  # the name under which nemo_run loads a script in the job's process


class StartedAlready(LaunchError):
    """A script that is only loaded starts its run."""


def activate() -> None:
    """Change nemo_run's local jobs, once: now, or as soon as a script imports nemo_run."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is not None and program.name == "nemo_run.core.runners.fdl_runner":  # this is a job's process
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    experiments = sys.modules.get("nemo_run.run.experiment")
    if experiments is None:
        imports.around(_then_changed, "nemo_run")
        return
    if hasattr(experiments.Experiment.run, "__wrapped__"):
        return
    importlib.import_module("mixtral_recipes.settings.serialization")  # teaches nemo_run what recipes hold
    experiment = experiments.Experiment
    _around(experiments.LocalExecutor, "assign", _with_this_python)
    _around(experiment, "__init__", _once)
    # what `add` calls: in ``experiment.add(llm.mixtral_8x7b.finetune_recipe())`` it is looked up before we are imported
    _around(experiment, "_add_single_job", _checked)
    _around(experiment, "_add_job_group", _checked)
    _around(experiment, "run", _single_node)
    _around(experiment, "_wait_for_jobs", _told)
    _around(sys.modules["nemo_run.run.job"].Job, "launch", _recorded)
    _around(sys.modules["nemo_run.cli.api"].Entrypoint, "main", _as_our_command)


def _around(holder: type, name: str, ours: Callable[..., Any]) -> None:
    """Have a method's calls go to `ours`, with the method itself as the first argument."""
    method = getattr(holder, name)

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return ours(method, *args, **kwargs)

    setattr(holder, name, called)


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
            raise StartedAlready("this script's runs are not started again in the processes that they started.")
        frame = frame.f_back


def _once(init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    refuse_while_loading()
    init(*args, **kwargs)


def _with_this_python(assign: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    assign(self, *args, **kwargs)
    self.env_vars.setdefault("PATH", str(Path(sys.executable).parent))  # the scheduler puts it before ours


def _as_our_command(main: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Have a script's ``run.cli.main(llm.finetune)`` run what ``nemo llm finetune`` does."""
    commands = sys.modules["nemo_run.cli"]
    if self.fn.__module__.startswith("mixtral_recipes.") and self.run_ctx_cls is commands.RunContext:
        commands.list_entrypoints()  # imports cli/nemo_run_entry.py
        self.run_ctx_cls = self.fn.cli_entrypoint.run_ctx_cls
    main(self, *args, **kwargs)


def _checked(add: Callable[..., Any], self: Any, task: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a recipe that cannot run when it is added, before a dry run or a queue."""
    refuse_while_loading()
    earlier = [each for job in self.jobs for each in _tasks(job)]
    checked = _check_group if isinstance(task, list) else check
    return add(self, *checked(task, executor, earlier), *args, **kwargs)


def _check_group(tasks: list[Any], executor: Any, earlier: Sequence[Any]) -> tuple[list[Any], Any]:
    """As `check`, for tasks that run side by side in one job: on an executor each, or on one for all.

    Raises:
        LaunchError: their number does not fit; or one is `slurm_executor`'s, whose script starts one task.
    """
    executors = executor if isinstance(executor, list) else [executor]
    if any(map(ranks_of_ours, executors)):
        raise LaunchError(
            "a slurm_executor starts one task per job, but this is a list of tasks: add each one separately; without "
            "dependencies they run at the same time."
        )
    if len(executors) not in (1, len(tasks)):
        raise LaunchError(f"{len(executors)} executors for {len(tasks)} tasks; use one for all, or one for each.")
    each = executors if len(executors) > 1 else executors * len(tasks)
    checked = [check(task, its, earlier) for task, its in zip(tasks, each, strict=True)]
    return [task for task, _ in checked], [its for _, its in checked[: len(executors)]]


def check(task: Any, executor: Any, earlier: Sequence[Any] = ()) -> tuple[Any, Any]:
    """Look through one of our recipes and what will run it; any other task is left as it is.

    Args:
        task: A recipe, or what else nemo_run takes.
        executor: Its executor.
        earlier: What its experiment runs before: it may start from a run that has made nothing yet.

    Returns:
        The recipe as nemo_run keeps it, and an executor that starts its ranks and sends the modules it comes from.

    Raises:
        MixtralRecipesError: as `preflight`; or the executor can pack nothing, or starts another number of ranks.
    """
    if not _is_ours(task):
        return task, with_own_modules(executor, task)
    with advice_for_scripts():
        task = as_configs(task)
        if _trains(task):
            folder = executor.job_details.profile().folder if ranks_of_ours(executor) is not None else _here
            awaited = any(_starts_from(task, run, folder) for run in earlier)
            if "resume" in task.__arguments__ and not awaited:
                task.resume = with_start(task.resume)
            preflight(task, None, elsewhere=_elsewhere(executor), awaited=awaited)
            _refuse_without_place(executor, task)
        task = as_text(task)  # after the checks: they say better what a value should be
        _refuse_without_commit(executor)
        executor = _with_ranks(with_own_modules(executor, task), task)
        if ranks_of_ours(executor) is not None and getattr(task, "log", None):
            executor = executor.clone()
            task = _placed(task, executor.job_details.profile(), earlier)
            for_recipe(executor, task, run_folder(task.log).parent)
        return task, executor


def _placed(task: Any, site: Cluster, earlier: Sequence[Any]) -> Any:
    """A copy of a recipe with full paths, also for a run of its experiment: its job has another working folder."""
    made = with_full_paths(task, site)
    if getattr(made.log, "explicit_log_dir", None):
        made.log.explicit_log_dir = str(site.folder(made.log.explicit_log_dir))
    else:
        made.log.log_dir = str(site.folder(made.log.log_dir or "runs"))
    runs = {run.log.name: run_folder(run.log) for run in earlier if _trains(run) and getattr(run, "log", None)}
    restore = getattr(getattr(made, "resume", None), "restore_config", None)
    for name in ("path", "adapter_path"):
        if start := getattr(restore, name, None):
            place = runs.get(start) or site.folder(start)
            if any(folder in (place, *place.parents) for folder in runs.values()):
                setattr(restore, name, str(place))
    return made


def _refuse_without_place(executor: Any, task: Any) -> None:
    """Refuse a run on this machine whose folder cannot be made; a cluster's node may see other folders."""
    from nemo_run import LocalExecutor

    if isinstance(executor, LocalExecutor) and getattr(task, "log", None):
        refuse_unwritable(run_folder(task.log).absolute())


def _refuse_without_commit(executor: Any) -> None:
    """Refuse the packager that a SlurmExecutor has by default, where it has no commit to pack."""
    from nemo_run import GitArchivePackager, LocalExecutor

    if isinstance(executor, LocalExecutor) or not isinstance(executor.packager, GitArchivePackager):
        return
    if subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD"], capture_output=True, check=False).returncode:
        raise LaunchError(
            f"the {type(executor).__name__} packs the newest git commit (run.GitArchivePackager), but {Path.cwd()} "
            "has none; use packager=run.Packager(), which sends only the recipe, or run.PatternPackager(...)."
        )


def _with_ranks(executor: Any, task: Any) -> Any:
    """An executor that starts a task's ranks: with torchrun, where it would start several processes without.

    NeMo's processes also find each other by Slurm's variables, so its scripts name no launcher. An executor that starts
    one process is left as it is: that one starts the ranks.

    Raises:
        LaunchError: it starts another number of processes than a trainer has.
    """
    from nemo_run import LocalExecutor, SlurmExecutor

    nodes, per_node, ours = executor.nnodes(), executor.nproc_per_node(), ranks_of_ours(executor)
    slurm = isinstance(executor, SlurmExecutor)
    if slurm:
        per_node = ours or executor.torchrun_nproc_per_node or executor.ntasks_per_node
    if executor.launcher is None and ours is None:
        if isinstance(executor, LocalExecutor) or (nodes == 1 and not (slurm and per_node > 1)):
            return executor
        executor = executor.clone()
        executor.launcher = "torchrun"
    trainer = task.trainer if _trains(task) else None
    if trainer is not None and nodes * per_node != trainer.num_nodes * trainer.devices:
        raise LaunchError(
            f"trainer.num_nodes x trainer.devices is {trainer.num_nodes} x {trainer.devices}, but the "
            f"{type(executor).__name__} starts {nodes} x {per_node} process(es); make them equal."
        )
    return executor


def ranks_of_ours(executor: Any) -> int | None:
    """Ranks per node of a `slurm_executor`, whose script starts them with torchrun; None of any other executor."""
    return getattr(getattr(executor, "job_details", None), "nproc_per_node", None)


def as_text(recipe: Any) -> Any:
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
            f"recipe.{place[1] if place else ''} holds an object, but recipes are stored as text: use "
            "run.Config(CLASS, ...) instead of CLASS(...)."
        ) from error
    return recipe


def _refuse_what_no_file_defines(recipe: Any) -> None:
    """Refuse what has no place in a file: nemo_run sends a script's file along, and looks names up in it.

    Raises:
        RecipeError: a lambda, or a class or function within a function; or one of a notebook or a prompt.
    """
    from fiddle import daglish

    for value, path in daglish.iterate(recipe):
        target = getattr(value, "__fn_or_cls__", value)
        if "<" in str(getattr(target, "__qualname__", "")):
            raise RecipeError(
                f"recipe{daglish.path_str(path)}: {target.__qualname__} is a lambda, or defined within a function, "
                "where the job's process cannot find it; define it at the top of a file, or start the recipe from here "
                "with run.run(recipe, direct=True)."
            )
        if at_a_prompt() and value is not target and target.__module__ == "__main__":
            raise RecipeError(
                f"{target.__name__} is defined in this notebook, where the job's process cannot find it; put it in a "
                "file and import it, or start the recipe from here with run.run(recipe, direct=True)."
            )


def _trains(task: Any) -> bool:
    return _is_ours(task) and task.__fn_or_cls__.__name__ in ("pretrain", "finetune", "train", "validate")


def _is_ours(task: Any) -> bool:
    return getattr(getattr(task, "__fn_or_cls__", None), "__module__", "").startswith("mixtral_recipes.")


def _here(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _starts_from(recipe: Any, earlier: Any, place: Callable[[str], Path]) -> bool:
    """Whether a recipe starts from the run of another one: its name, its folder, or something in that.

    Args:
        recipe: The recipe.
        earlier: The other one.
        place: Where a relative path leads.
    """
    restore = getattr(getattr(recipe, "resume", None), "restore_config", None)
    if restore is None or not (_trains(earlier) and getattr(earlier, "log", None)):
        return False
    folder = run_folder(earlier.log).absolute()
    named = [each for each in (restore.path, restore.adapter_path) if each]
    places = [place(each) for each in named]
    return earlier.log.name in named or any(folder in (place, *place.parents) for place in places)


def _elsewhere(executor: Any) -> bool:
    """Whether an executor's jobs have other files than this machine."""
    from nemo_run import LocalExecutor, SlurmExecutor
    from nemo_run.core.tunnel.client import SSHTunnel

    if ranks_of_ours(executor) is not None:
        return executor.job_details.profile().elsewhere
    if isinstance(executor, SlurmExecutor):
        return bool(executor.container_image) or isinstance(executor.tunnel, SSHTunnel)
    return not isinstance(executor, LocalExecutor)


def _recorded(launch: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Keep the record of a run that a `slurm_executor` has submitted."""
    launch(self, *args, **kwargs)
    task, job_id = self.task, self.handle.rpartition("/")[2]
    if not job_id.isdigit() or ranks_of_ours(self.executor) is None:  # a dry run, or one in this process, has none
        return
    if _trains(task) and getattr(task, "log", None):
        record = records.new(task.log.name, run_folder(task.log), "slurm", task.__fn_or_cls__.__name__)
        record.job_id = job_id
        complete(record, self.executor)


def _single_node(run: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Start jobs of this machine whatever Slurm's variables say; say in a line what sbatch said to a recipe."""
    hidden = os.environ.pop("SLURM_PROCID", None) if all(map(_on_one_machine, self.jobs)) else None
    try:
        for job in self.jobs:
            if ranks_of_ours(job.executor) is not None and _trains(job.task) and not job.dependencies:
                check_files_there(job.executor, job.task)
        return run(self, *args, **kwargs)
    except Exception as error:
        ours = [job for job in self.jobs if ranks_of_ours(job.executor) is not None]
        forget_secrets([job.executor for job in ours if not getattr(job, "handle", "")], error)
        stderr = getattr(getattr(error, "result", error), "stderr", "")  # of sbatch
        if not stderr or not any(_is_ours(task) for job in self.jobs for task in _tasks(job)):
            raise
        raise LaunchError(f"the job was not submitted: {one_line(stderr)}.") from error
    finally:
        if hidden is not None:
            os.environ["SLURM_PROCID"] = hidden


def _on_one_machine(job: Any) -> bool:
    from nemo_run import LocalExecutor

    return isinstance(job.executor, LocalExecutor) and job.executor.nnodes() == 1


def _told(wait: Callable[..., None], self: Any, jobs: list[Any]) -> None:
    ours = [job for job in jobs if _on_one_machine(job) and all(map(_is_ours, _tasks(job)))]
    with _signals_passed_on(self, ours):
        wait(self, jobs)
    for job in ours:
        for app in _apps(self, job):
            _raise_for(app, job)


def _tasks(job: Any) -> list[Any]:
    """What a job, or a group of jobs, calls."""
    return getattr(job, "tasks", None) or [getattr(job, "task", None)]


def _raise_for(app: Any, job: Any) -> None:
    """Raise what a job, or a task of a group, ended with; of a group nemo_run's status says how its last task is.

    Raises:
        LaunchError: it failed.
        Preempted: it was asked to stop, and saved.
    """
    if app.state.name == "SUCCEEDED":
        return
    try:
        message = json.loads(app.get_structured_error_msg())["message"]
        text, code = message["message"], message["extraInfo"].get("exit_code")
    except (ValueError, KeyError, TypeError, AttributeError):  # it ended without a word
        text, code = f"its log is in {job.executor.job_dir}", None
    if code == Preempted.exit_code:
        raise Preempted(text)
    if text.startswith("SignalException"):  # torchrun's: it stopped the ranks, which save
        raise Preempted(
            f"job {job.id}: asked to stop; its log says what it saved. Run the same script again to continue."
        )
    raise LaunchError(f"job {job.id} failed: {text}")


@contextlib.contextmanager
def _signals_passed_on(experiment: Any, jobs: list[Any]) -> Iterator[None]:
    """Pass Ctrl-C on to the jobs, and other requests to stop as SIGTERM: they save at the first, end at the second."""
    if not jobs:
        yield
        return

    def forward(number: int, _frame: Any) -> None:
        passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for app in (app for job in jobs for app in _apps(experiment, job)):
            for replica in itertools.chain(*app.role_replicas.values()):
                if replica.proc.poll() is None:
                    replica.proc.send_signal(passed)

    with stops_handled_by(forward):
        yield


def _apps(experiment: Any, job: Any) -> list[Any]:
    """What nemo_run started: one for a job, of a group one for each task.

    It offers no public way to them; a test watches this seam.
    """
    handles = [handle for handle in getattr(job, "handles", [job.handle]) if handle]
    found = [experiment._runner._scheduler_app_id(handle, check_session=False) for handle in handles]
    return [scheduler._apps[app_id] for scheduler, _, app_id in found]
