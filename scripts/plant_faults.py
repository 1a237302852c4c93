"""Plant known faults one at a time, and report which of them no test notices.

A fault is a row of `scripts/faults.toml`: a file, a stretch of its text, what to put in its place, and the tests that
should fail then. Each is planted in a copy of the working tree, and only those tests are run on it. Before that, all
tests named are run once on a copy without a fault: a test that fails anyway notices nothing.

    python scripts/plant_faults.py                        # all of them, about ten seconds each
    python scripts/plant_faults.py --only packs-leak      # one
    python scripts/plant_faults.py --list

The exit code is 0 when every fault is caught, else 1. A fault whose text is not found exactly once, or whose tests
cannot be run, counts as broken, not as caught.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "scripts" / "faults.toml"
_TIMEOUT_S = 600
_TESTS_PASSED, _TESTS_FAILED = 0, 1  # pytest's exit codes; the others say that it could not run them


@dataclass(frozen=True)
class Fault:
    """A fault to plant.

    Attributes:
        name: What `--only` takes.
        what: What is wrong once it is planted.
        file: Where, relative to the root.
        text: What stands there; it must be found exactly once.
        replacement: What is put in its place.
        tests: Paths or ids, as pytest takes them, of the tests that should fail.
    """

    name: str
    what: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        """The file's content with the fault in it.

        Raises:
            ValueError: the text to replace is not there exactly once.
        """
        count = source.count(self.text)
        if count != 1:
            raise ValueError(f"{self.file}: the text to replace is found {count} times, not once")
        return source.replace(self.text, self.replacement)


@dataclass(frozen=True)
class Outcome:
    """What came of one fault: ``caught``, ``survived``, or ``broken`` (nothing was found out)."""

    name: str
    verdict: str
    detail: str
    seconds: float


def read_faults(path: Path = FAULTS) -> list[Fault]:
    """Every fault, in the file's order."""
    rows = tomllib.loads(path.read_text())["fault"]
    return [Fault(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_tree(target: Path) -> None:
    """Copy what git knows, and new files it does not ignore, as they are in the working tree; links stay links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in listed.decode().split("\0"):
        source = ROOT / name
        if not name or not (source.is_symlink() or source.is_file()):
            continue  # deleted, but not yet in git
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests on a copy; pytest's exit code (-1: too slow) and the end of its output."""
    home = tree.with_name(f"{tree.name}-home")
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MIXTRAL_RECIPES_HOME": str(home),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as pytest:
        try:
            output, _ = pytest.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(pytest.pid, signal.SIGKILL)  # what the tests started, too
            return -1, f"took more than {_TIMEOUT_S} s"
    return pytest.returncode, output


def try_fault(fault: Fault) -> Outcome:
    """Plant one fault in a copy of its own, and see whether a test fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        try:
            file = tree / fault.file
            file.write_text(fault.planted(file.read_text()))
        except (OSError, ValueError) as error:
            return Outcome(fault.name, "broken", str(error), time.monotonic() - start)
        code, output = run_tests(tree, fault.tests)
    verdict = {_TESTS_PASSED: "survived", _TESTS_FAILED: "caught"}.get(code, "broken")
    return Outcome(fault.name, verdict, _detail(verdict, code, output, fault.tests), time.monotonic() - start)


def _detail(verdict: str, code: int, output: str, tests: Sequence[str]) -> str:
    """Which test failed, or why nothing was found out."""
    if verdict == "survived":
        return f"{' '.join(tests)} passed"
    lines = [line for line in output.splitlines() if line.strip()]
    failed = next((line[7:].split(" - ")[0] for line in lines if line.startswith("FAILED ")), None)
    return failed or f"pytest ended with {code}: {lines[-1] if lines else 'no output'}"


def tests_pass_without_faults(faults: Sequence[Fault]) -> str | None:
    """The end of pytest's output where a test that should notice faults fails without one; None when all pass."""
    tests = sorted({test for fault in faults for test in fault.tests})
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        copy_tree(Path(folder) / "tree")
        code, output = run_tests(Path(folder) / "tree", tests)
    return None if code == _TESTS_PASSED else "\n".join(output.splitlines()[-25:])


def main() -> int:
    """Plant the faults asked for."""
    parser = argparse.ArgumentParser(description="Plant known faults one at a time; report which no test notices.")
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault; may be given more than once")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the faults and plant none")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    faults = read_faults()
    unknown = sorted(set(options.only or ()) - {fault.name for fault in faults})
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; see --list")
    chosen = [fault for fault in faults if not options.only or fault.name in options.only]
    if options.list:
        for fault in chosen:
            print(f"{fault.name:32} {fault.what}")
        return 0

    failing = tests_pass_without_faults(chosen)
    if failing:
        print(f"The tests do not pass without a fault:\n{failing}", file=sys.stderr)
        return 1
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(try_fault, chosen):
            print(f"{outcome.verdict:8} {outcome.name:32} {outcome.seconds:5.1f} s  {outcome.detail}", flush=True)
            outcomes.append(outcome)
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("caught", "survived", "broken")}
    print(f"{len(outcomes)} faults: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if options.json:
        print(json.dumps({"faults": [asdict(outcome) for outcome in outcomes], **counts}))
    return 0 if counts["caught"] == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
