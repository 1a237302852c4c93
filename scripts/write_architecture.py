"""Writes the parts of docs/architecture.md that the code decides, between ``<!-- NAME -->`` and ``<!-- end -->``.

    python scripts/write_architecture.py

``layers`` come from import-linter's contract in pyproject.toml. ``walk`` comes from a run: ``mixtral-recipes finetune
--peft lora`` trains the embedded model for one step, and every process of it notes who called whom on the way to
``train_step``. Tests make both again and compare.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
OURS = ("cli", "executors", "importers", "mixtral_recipes")
COMMAND = "finetune --peft lora --no-export trainer.max_steps=1"
# What to look out for: function -> its file. The first ends the command's walk; the others are the training process's.
ENDS = {
    "run_processes": "executors/local.py",
    "build_run": "mixtral_recipes/training/run.py",
    "train_step": "mixtral_recipes/training/step.py",
}

# Python imports this before anything else. It costs a traced process next to nothing: every function but those it
# looks for is noted once and never again.
TRACER = """
import json, os, sys

ENDS = json.loads(os.environ["WALK_ENDS"])

def entered(code, _offset):
    if not code.co_filename.endswith(ENDS.get(code.co_name, "nowhere")):
        return sys.monitoring.DISABLE
    frame, stack = sys._getframe(1), []
    while frame is not None:
        stack.append([os.path.realpath(frame.f_code.co_filename), frame.f_code.co_name])
        frame = frame.f_back
    with open(os.environ["WALK_FILE"], "a") as file:
        file.write(json.dumps([code.co_name, stack[::-1]]) + "\\n")
    return sys.monitoring.DISABLE

sys.monitoring.use_tool_id(sys.monitoring.PROFILER_ID, "walk")
sys.monitoring.register_callback(sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START, entered)
sys.monitoring.set_events(sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START)
"""

type Walk = dict[str, list[str]]  # file -> its functions on the stack, outermost first


def main() -> None:
    """Rewrite the page."""
    with tempfile.TemporaryDirectory() as folder:
        traced = walks(Path(folder))
    PAGE.write_text(page(PAGE.read_text(), {"layers": layers(), "walk": walk(traced)}))


def page(text: str, blocks: dict[str, str]) -> str:
    """The page with these blocks in place of those it has."""
    for name, block in blocks.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"{PAGE} has no block named {name}")
        text = before + start + block + end + after
    return text


def layers() -> str:
    """The layers, highest first, as import-linter checks them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    rows = [row.replace("mixtral_recipes.", "") for row in contract["layers"]]
    return "".join(f"    {row}\n" for row in rows)


def walks(folder: Path) -> dict[str, Walk]:
    """Run the command, and say for each function of `ENDS` through which of our files it was reached.

    Args:
        folder: Where the run may write.

    Raises:
        RuntimeError: the run failed, or ended without training.
    """
    (folder / "sitecustomize.py").write_text(TRACER)
    traced = folder / "walk.jsonl"
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "MIXTRAL_RECIPES_HOME": str(folder / "home"),
        "WALK_ENDS": json.dumps(ENDS),
        "WALK_FILE": str(traced),
    }
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", *COMMAND.split(), "--dir", str(folder / "runs")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{COMMAND} failed:\n{done.stdout}{done.stderr}")
    found = dict(map(json.loads, traced.read_text().splitlines()))
    if found.keys() != ENDS.keys():
        raise RuntimeError(f"{COMMAND} never reached {', '.join(sorted(ENDS.keys() - found.keys()))}")
    return {end: files(stack) for end, stack in found.items()}


def files(stack: list[list[str]]) -> Walk:
    """Our files among a stack's, with their functions."""
    found: Walk = {}
    for path, function in stack:
        inside = Path(path).relative_to(ROOT) if Path(path).is_relative_to(ROOT) else Path()
        if inside.parts[:1] and inside.parts[0] in OURS and not function.startswith("<"):  # not .venv
            found.setdefault(inside.as_posix(), []).append(function)
    return found


def walk(traced: dict[str, Walk]) -> str:
    """The walk in words: what each process calls, file by file."""
    command, trainer = traced["run_processes"], trainers(traced)
    lines = [
        "The command:\n\n",
        *rows(command),
        f"\nThe process that trains, {len(trainer)} files:\n\n",
        *rows(trainer),
    ]
    return "".join(lines)


def trainers(traced: dict[str, Walk]) -> Walk:
    """The training process's files: those that lead to a run that can step, then those that lead to the step."""
    building, stepping = traced["build_run"], traced["train_step"]
    found = {file: list(functions) for file, functions in building.items()}
    for file, functions in stepping.items():
        known = found.setdefault(file, [])
        known += [name for name in functions if name not in known]
    return found


def rows(traced: Walk) -> list[str]:
    """A table of one process's files."""
    found = ["| file | through |\n", "|---|---|\n"]
    for file, functions in traced.items():
        calls = ", ".join(f"`{name}`" for name in functions)
        found.append(f"| `{file}` | {calls} |\n")
    return found


if __name__ == "__main__":
    main()
