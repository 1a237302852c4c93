"""A module run in a process of its own: for libraries that end it on what they do not like, or must be alone in it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from mixtral_recipes.errors import CheckpointError

_POLL_SECONDS = 0.2
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # by which it would take itself for one of several


def in_own_process(
    failure: str, module: str, arguments: list[str], *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Run a module; it is ended with this process's call.

    Args:
        failure: How the error begins.
        module: The module's name.
        arguments: Its arguments.
        meanwhile: Called now and then.

    Raises:
        CheckpointError: it failed; with its last line.
    """
    env = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
            reader.start()
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                meanwhile()
            reader.join()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        raise CheckpointError(f"{failure} ({said[-300:]}).")
