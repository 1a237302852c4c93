"""Commands on a disk that fills up, or killed, at random moments: whole or absent. `interrupted.py` says how.

Set MIXTRAL_RECIPES_KILLS=30 for the full number.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = os.environ.get("MIXTRAL_RECIPES_KILLS", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operations", "fault"),
    [
        ("import,export,prepare,report", "full"),
        ("export,prepare,report", "killed"),  # imports and training are killed in test_atomic.py and test_stopping.py
        pytest.param("finetune", "full", id="finetune-full"),
    ],
)
def test_whole_or_absent(operations: str, fault: str) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own (unshare -rm)")
    script = Path(__file__).with_name("interrupted.py")
    count = "1" if operations == "finetune" and COUNT == "2" else COUNT
    command = ["unshare", "-rm", sys.executable, "-W", "ignore", str(script), operations, fault, count, "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("}")] == operations.split(",")
