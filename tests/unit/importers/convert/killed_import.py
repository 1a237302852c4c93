"""Run by test_atomic.py: forks imports and kills each at its moment.

    python killed_import.py SOURCE OUTPUT SEED COUNT

The first import is timed and removed. Then COUNT imports are killed at moments drawn from 0 to 1.1 times that time;
after each, the output must be absent or whole. Prints how many were killed before and how many after the end.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch.distributed.checkpoint  # noqa: F401  # loaded once, before the forks

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.importers.convert import plan  # noqa: F401
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint


def import_in_a_fork(source: str, output: Path) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        import_checkpoint(source, output, progress=False)
        os._exit(0)
    return child


def main() -> None:
    source, output = sys.argv[1], Path(sys.argv[2])
    moments = random.Random(int(sys.argv[3]))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        os.waitpid(import_in_a_fork(source, output), 0)
        times.append(time.perf_counter() - start)
        shutil.rmtree(output)
    killed = {"early": 0, "late": 0}
    for _ in range(int(sys.argv[4])):
        child = import_in_a_fork(source, output)
        time.sleep(moments.uniform(0, 1.1 * min(times)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if output.exists():
            verify(output)
            shutil.rmtree(output)
            killed["late"] += 1
        else:
            killed["early"] += 1
    print(killed["early"], killed["late"])


if __name__ == "__main__":
    main()
