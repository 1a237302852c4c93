"""How long commands take to start, as ratios to a bare ``import nemo_run`` in the same run.

    python benchmarks/startup.py                  # five rounds, in each every command once
    python benchmarks/startup.py --repeats 9 --recipes mixtral_tiny mixtral_8x7b

Prints one JSON object: for each command the median seconds, the spread (largest less smallest), and the ratio of the
medians; `cpu` is the same for the processor time of the process and its children, which a busy machine disturbs less.
The package measured is the one on the path, so an older checkout is measured by ``PYTHONPATH=OLDER``.
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

from temporary import temporary_folder

from mixtral_recipes.recipes import catalog

BARE = "import nemo_run"


def commands(recipes: list[str]) -> dict[str, list[str]]:
    """What is measured, by the name it is reported under."""
    ours = [sys.executable, "-m", "mixtral_recipes.cli.main"]
    lines = [
        "--help", "recipes list", "plan --recipe mixtral_8x7b", "recipes show mixtral_8x7b.finetune", "doctor",
        *(f"finetune --recipe {recipe} --dry-run" for recipe in recipes if catalog.entry(recipe).base),
        *(f"pretrain --recipe {recipe} --dry-run" for recipe in recipes),
    ]  # fmt: skip
    found = {code: [sys.executable, "-c", code] for code in ("pass", BARE, "import torch")}
    return found | {line: [*ours, *line.split()] for line in lines}


def measure(argv: list[str], folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor, of one run that must succeed (`doctor` may find something bad)."""
    before, began = _processor(), time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=folder)
    took = time.perf_counter() - began
    if done.returncode and argv[-1] != "doctor":
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr}")
    return took, _processor() - before


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure in turn and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=catalog.names(), help="whose dry runs are measured")
    asked = parser.parse_args()
    every = commands(asked.recipes)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    with temporary_folder() as folder:
        os.environ["MIXTRAL_RECIPES_HOME"] = str(folder)
        for argv in every.values():
            measure(argv, folder)  # once for the disk's sake
        for _ in range(asked.repeats):
            for name, argv in every.items():
                seconds[name].append(measure(argv, folder))
    table = {name: _row(runs, seconds[BARE]) for name, runs in seconds.items()}
    print(json.dumps({"repeats": asked.repeats, "load_at_end": os.getloadavg()[0], "commands": table}, indent=2))


def _row(runs: list[tuple[float, float]], bare: list[tuple[float, float]]) -> dict[str, float]:
    (clock, cpu), (bare_clock, bare_cpu) = zip(*runs, strict=True), zip(*bare, strict=True)
    return {
        "seconds": round(statistics.median(clock), 3),
        "spread": round(max(clock) - min(clock), 3),
        "ratio": round(statistics.median(clock) / statistics.median(bare_clock), 3),
        "cpu": round(statistics.median(cpu), 3),
        "cpu_ratio": round(statistics.median(cpu) / statistics.median(bare_cpu), 3),
    }


if __name__ == "__main__":
    main()
