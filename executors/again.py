"""A command run once more by several processes, where its model needs them."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system.machine import cores


def again(words: Sequence[str], processes: int) -> None:
    """Run a command line under torchrun on this machine; rank 0 is the one that reads and prints.

    Args:
        words: The command line, without the program's name.
        processes: How many ranks.

    Raises:
        LaunchError: a rank failed; the message is that rank's.
    """
    import os

    program = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*program, *rendezvous, "-m", "mixtral_recipes.cli.main", *words],
            stderr=errors, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False,
        )  # fmt: skip
        errors.seek(0)
        lines = errors.read().splitlines()
    told = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    if done.returncode:
        raise LaunchError(told[0] if told else f"a process ended with code {done.returncode}: {(lines or ['?'])[-1]}")
    for line in lines:
        if line.startswith(("warning:", "note:")):
            print(line, file=sys.stderr)
