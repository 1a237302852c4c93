"""A command run once more by several processes, where its model needs them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.local import environment, torchrun
from mixtral_recipes.executors.runs.logs import of_rank
from mixtral_recipes.system.files import temporary_folder
from mixtral_recipes.system.machine import children
from mixtral_recipes.training.guards.signals import stops_handled_by

_ERROR = "error: "


def again(words: Sequence[str], processes: int, *, to_ranks: bool = False) -> None:
    """Run a command line under torchrun on this machine; rank 0 reads what is typed and is the one that is shown.

    Args:
        words: The command line, without the program's name.
        processes: How many ranks.
        to_ranks: Whether SIGTERM and Ctrl-C are the ranks' business alone: they end by themselves, and well; if not,
            this process is stopped by it too. Else torchrun ends them.

    Raises:
        LaunchError: a rank failed; the message is that rank's.
    """
    command = [*torchrun(processes), "--tee=2", "-m", "mixtral_recipes.cli.main", *words]
    errors: list[str] = []
    given: list[int] = []
    with temporary_folder() as logs, contextlib.ExitStack() as stack:
        ranks = subprocess.Popen(
            command, env=environment(processes, logs), stderr=subprocess.PIPE, text=True,
            start_new_session=to_ranks,
        )  # fmt: skip
        assert ranks.stderr is not None
        stack.enter_context(ranks.stderr)

        def give(number: int, _frame: Any) -> None:  # torchrun would kill the ranks after a while, and then fail
            given.append(number)
            for pid in children(ranks.pid) or [ranks.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        if to_ranks:
            stack.enter_context(stops_handled_by(give))
        try:
            for line in ranks.stderr:  # torchrun's own lines have no rank before them, and are not shown
                said = [text for rank in range(processes) if (text := of_rank(line.rstrip("\n"), rank)) is not None]
                errors += [text.removeprefix(_ERROR) for text in said if text.startswith(_ERROR)]
                shown = of_rank(line, 0)
                if shown is not None and shown.strip() and not shown.startswith(_ERROR):
                    print(shown, end="", file=sys.stderr, flush=True)
            code = ranks.wait()
        except BaseException:  # this process alone was stopped
            ranks.terminate()
            ranks.wait()
            raise
    if code and given:
        signal.raise_signal(given[0])
    if code:
        raise LaunchError(errors[0] if errors else f"a process ended with exit code {code} and no message.")
