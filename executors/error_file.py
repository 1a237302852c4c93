"""The file in which torchrun and nemo_run's scheduler look for a rank's error: TORCHELASTIC_ERROR_FILE."""

import os
import time
from pathlib import Path

from mixtral_recipes.system.files import write_json


def write(error: str, trace: str, exit_code: int) -> None:
    """Leave an error there, in torchelastic's form; does nothing if no file was named, or if one was already written.

    Args:
        error: In a line.
        trace: Its traceback.
        exit_code: What the process will end with.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or os.path.exists(file):
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    extra = {"py_callstack": trace, "timestamp": str(int(time.time())), "exit_code": exit_code}
    write_json(Path(file), {"message": {"message": error, "extraInfo": extra}})
