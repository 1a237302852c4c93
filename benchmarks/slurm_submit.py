"""What submitting to Slurm costs beyond `import nemo_run`, as a whole command, in seconds of wall clock and of CPU.

Starts the two-node test cluster of tests/slurm (needs slurm-wlm and munge), then alternates a Python process that only
imports nemo_run with `mixtral-recipes finetune --executor slurm --detach`, and takes the median of each.

    python benchmarks/slurm_submit.py --repeats 5
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))

from slurm_cluster import Cluster
from temporary import temporary_folder

IMPORT = [sys.executable, "-W", "ignore", "-c", "import nemo_run"]
SUBMIT = [
    sys.executable, "-m", "mixtral_recipes.cli.main", "finetune", "--recipe", "mixtral_tiny", "--executor", "slurm",
    "--partition", "debug", "--num-nodes", "2", "--num-gpus-per-node", "1", "--detach", "--slurm", "sbatch.hold=true",
]  # fmt: skip
LIST = [sys.executable, "-m", "mixtral_recipes.cli.main", "runs", "list"]


def cost(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command with its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with temporary_folder() as folder:
        cluster = Cluster(folder / "cluster")
        env = cluster.env | {"MIXTRAL_RECIPES_HOME": f"{folder}/home"}
        try:
            cluster.start()
            costs: dict[str, list[tuple[float, float]]] = {"import": [], "submit": [], "list": []}
            for number in range(repeats + 1):
                for name, command in (("import", IMPORT), ("submit", SUBMIT), ("list", LIST)):
                    more = ["--dir", f"{folder}/runs", "--name", f"run{number}"] if name == "submit" else []
                    costs[name].append(cost([*command, *more], env))
        finally:
            cluster.stop()
    median = {
        name: [round(statistics.median(value[part] for value in values[1:]), 3) for part in (0, 1)]
        for name, values in costs.items()  # the first round fills the disk's cache
    }
    beyond = [round(a - b, 3) for a, b in zip(median["submit"], median["import"], strict=True)]
    print(json.dumps({"benchmark": "slurm_submit", "repeats": repeats, "cores": os.cpu_count(),
                      "seconds (wall, cpu)": median, "submit beyond import nemo_run": beyond}))  # fmt: skip


if __name__ == "__main__":
    main()
