"""What torchrun starts: load the job from its file, call it, and record how this rank ended.

nemo_run's own entry point (``fdl_runner``) does the first half and costs each rank an import of nemo_run, 3 to 5
seconds; a recipe stored with plain fiddle types needs fiddle only.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import EnvironmentProblem, MixtralRecipesError, Preempted, asked_by_command, of_the_machine
from mixtral_recipes.executors import error_file
from mixtral_recipes.executors.runs.records import locked
from mixtral_recipes.executors.stored import CALL, load_call, load_recipe, store_result
from mixtral_recipes.settings.log import run_folder
from mixtral_recipes.system import quiet, streams
from mixtral_recipes.system.files import private_folder, write_json
from mixtral_recipes.system.garbage import seldom_collected
from mixtral_recipes.system.private import without_passwords
from mixtral_recipes.system.ranks import launched_local_rank, launched_rank
from mixtral_recipes.training.guards import watchdog


def call(path: Path) -> None:
    """Do what is stored in ``path``: build a recipe and call it, or call what a script called."""
    if path.name == CALL:
        result = load_call(path)()
        if launched_rank() == 0:
            store_result(result, path)
        return
    import fiddle as fdl

    recipe = load_recipe(path)
    rank = launched_rank()
    with contextlib.ExitStack() as stack:
        log = getattr(recipe, "log", None)
        if rank == 0 and log is not None and "MIXTRAL_RECIPES_LOCKED" not in os.environ:
            stack.enter_context(locked(run_folder(log)))
            os.environ["MIXTRAL_RECIPES_LOCKED"] = "1"
        with asked_by_command():
            fdl.build(recipe)()


def _end(error: BaseException | None) -> dict[str, Any]:
    """This rank's end as a JSON object: exit code, one-line error and traceback."""
    code, text, trace = 0, "", ""
    if isinstance(error, MixtralRecipesError):
        code, text = error.exit_code, str(getattr(error, "proxy_base_exception", error))  # fiddle adds where it was
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        text = "" if error.code is None or isinstance(error.code, int) else str(error.code)
    elif problem := of_the_machine(error) if error is not None else None:
        code, text = problem.exit_code, str(problem)
    elif error is not None:
        code, text = 1, f"{type(error).__name__}: {error}".strip()
        trace = "".join(traceback.format_exception(error))
    return {
        "rank": launched_rank(),
        "local_rank": launched_local_rank(),
        "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        "exit_code": code,
        "error": without_passwords(" ".join(text.split()))[:2000],
        "traceback": without_passwords(trace),
        "time": time.time(),
    }


def _record(end: dict[str, Any]) -> bool:
    """Write the end where the launcher and torchelastic look for it; whether it is where the launcher does."""
    folder = os.environ.get("MIXTRAL_RECIPES_ATTEMPT_DIR")
    try:
        if folder:
            private_folder(Path(folder))
            write_json(Path(folder) / f"rank-{end['rank']}.json", end, private=True)
            if end["exit_code"] == Preempted.exit_code:
                Path(folder, "preempted").touch(mode=0o600)
        if end["exit_code"] not in (0, Preempted.exit_code):
            error_file.write(end["error"], end["traceback"], end["exit_code"])
    except (OSError, EnvironmentProblem):  # a full disk changes nothing about how the rank ended
        return False
    return bool(folder)


_STOPPED_EARLY = "asked to stop before training began; run the same command again."
_GRACE_S = 10.0  # that a rank has to leave by itself


def _stopped_early(_number: int, _frame: Any) -> None:
    if sys.exception() is None:  # else torchrun's, because of the error that this rank is about to report
        raise Preempted(_STOPPED_EARLY)


def _end_if_blocked() -> None:
    """Have a thread end this rank if it is asked to stop before training, and does not come to `_stopped_early`.

    Python's handlers do not run while a library waits in C, as for a rank that has left, for minutes. What tells the
    thread is written by C's own.
    """
    asked, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a pool's workers are ended with SIGTERM

    def before_training() -> bool:
        return signal.getsignal(signal.SIGTERM) is _stopped_early

    def watch() -> None:
        while number := os.read(asked, 1):
            if number[0] == signal.SIGTERM and before_training():
                time.sleep(_GRACE_S)
                if before_training():
                    end = _end(Preempted(_STOPPED_EARLY))
                    os._exit(0 if _record(end) else end["exit_code"])

    threading.Thread(target=watch, name="stop", daemon=True).start()


def main() -> int:
    """Run the recipe file named on the command line; return the exit code.

    A failure is recorded rather than printed when there is somewhere to record it: the launcher and ``runs logs`` show
    the first failing rank's error, and not the "connection closed by peer" of every other rank. For the same reason a
    rank that saved and stopped ends with 0 there: torchrun then lets the other ranks finish their part of the save.
    """
    streams.prepare()
    if "MIXTRAL_RECIPES_UMASK" in os.environ:
        os.umask(int(os.environ["MIXTRAL_RECIPES_UMASK"], 8))
    signal.signal(signal.SIGTERM, _stopped_early)
    _end_if_blocked()
    quiet.our_process()
    watchdog.before_exit.append(lambda error: _record(_end(error)))  # it ends a hung rank without coming back here
    error: BaseException | None = None
    try:
        with seldom_collected():
            call(Path(sys.argv[1]))
    except BaseException as caught:
        error = caught
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, because another rank failed: this one is ending
    end = _end(error)
    recorded = _record(end)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if end["exit_code"] == Preempted.exit_code and recorded:
        return 0
    if end["exit_code"] != 0 and not recorded:
        print(end["traceback"] or end["error"], file=sys.stderr, flush=True)
    return end["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
