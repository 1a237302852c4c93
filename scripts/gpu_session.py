#!/usr/bin/env python3
"""A session on a machine with a GPU: what this project says of GPUs, run and measured part by part.

    make gpu                            all parts (about half an hour on an H200)
    make gpu PARTS="tests bench-lora"   some
    python scripts/gpu_session.py --within 570 quickstart doctor    where the machine is there for so long only
    python scripts/gpu_session.py --summary     what earlier calls left, held against the targets

Each part has a time limit and goes into the folder --out: PART.out and PART.err as it printed them, PART.json with how
it ended, how long it took and its result, which is what there was if its time was up. One that fails or takes too long
stops no other. At the end every target is listed with what was measured and whether it is met, as text and, after each
part, in summary.json.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_GRACE = 30  # seconds for a part that is interrupted to print what it has
_LEAST = 60  # what a part takes to load its libraries: with less it is not begun
_TEST, _HOW = r"(\S+::\w+(?:\[[^]]*\])?)", r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
_OUTCOME = re.compile(rf"{_TEST} {_HOW}|\[gw\d+\] \[ *\d+%\] {_HOW} {_TEST}")  # pytest -v, in one process or several
LARGE_GB = 130  # a card that holds all layers of 8x7B; where it is smaller fewer are trained whole
_STEP = "benchmarks/gpu_step.py --limit {soon}"
_CLI = "-m mixtral_recipes.cli.main"
# Three processes on the card, since small models wait for the host. One that dies, or is ended as it hangs, loses the
# test it was at; another takes the rest. (Shared out by file, the test would be tried again and again.)
_PYTEST = "-m pytest -v -n 3 --dist worksteal --timeout 200 --timeout-method thread"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: The part's name, and that of its files.
        command: Words for Python; ``{out}`` stands for the folder, ``{soon}`` for when to come to an end.
        limit: Seconds it may take.
        small: The command on a smaller card; empty to leave it out, None for the same command.
        gives_up: Whether it prints a result when it is interrupted. Tests do not: the one that runs would fail of it.
    """

    name: str
    command: str
    limit: int
    small: str | None = None
    gives_up: bool = True

    def on(self, memory_gb: float) -> str:
        """The command for a card of this size; empty if it is too small."""
        return self.command if memory_gb >= LARGE_GB or self.small is None else self.small


_SAME = f"{_STEP} --layers 2 --mode lora lora-attention full --contenders ours grouped_mm"  # each is read from files
_FULL = f"{_STEP} --mode full --contenders ours grouped_mm --microbatches 16 --steps 5 --profile"
_WHOLE = f"{_STEP} --layers 32 --contenders ours --precisions bf16 --apart"
PARTS = (
    Part("quickstart", f"{_CLI} finetune --peft lora --json --debug --dir {{out}}/runs --name quickstart", 300),
    Part("doctor", f"{_CLI} doctor --gpu --json --debug", 420),
    Part("tests", f"{_PYTEST} --durations=20 tests/gpu", 560, gives_up=False),
    Part("bench-same", f"{_SAME} --precisions bf16 --steps 4", 420),
    Part("bench-lora", f"{_STEP} --mode lora --precisions bf16 delayed tensorwise blockwise --profile", 560),
    Part("bench-attention", f"{_STEP} --mode lora-attention --profile", 300),
    Part("bench-full", f"{_FULL} --layers 3", 560, f"{_FULL} --layers 2"),
    Part("bench-32", f"{_WHOLE} --recompute moe_act,layernorm none full:8 --steps 3", 560, ""),
    Part("bench-16k", f"{_WHOLE} --sequence 16384 --microbatches 1 --recompute moe,layernorm full --steps 2", 560, ""),
)


@dataclass(frozen=True)
class Target:
    """Something to be shown.

    Attributes:
        text: What.
        part: Which part measures it.
        value: Takes the number from the part's result.
        least: What it must reach.
        most: What it must stay below.
    """

    text: str
    part: str
    value: Callable[[Any], float]
    least: float | None = None
    most: float | None = None

    def met_by(self, value: float) -> bool:
        """Whether a value meets it."""
        return (self.least is None or value >= self.least) and (self.most is None or value < self.most)

    @property
    def wanted(self) -> str:
        """What is wanted, in words."""
        return f">= {self.least:g}" if self.least is not None else f"< {self.most:g}"


def _only(report: dict[str, Any]) -> dict[str, Any]:
    (result,) = report["results"]
    return result


def _ours(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of ours that ran."""
    rows = result["contenders"]
    return {name: row for name, row in rows.items() if name.startswith("ours") and "failed" not in row}


def _in_fp8(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(("ours bf16", "ours fp32"))]


def bf16_to_best_other(report: dict[str, Any]) -> float:
    """How many times as fast as the best of transformers ours is in bf16."""
    return _only(report)["to_best_other"]["ours bf16"]


def fp8_to_best_other(report: dict[str, Any]) -> float:
    """Likewise, ours in its best FP8."""
    ratios = _only(report)["to_best_other"]
    return max(ratios[name] for name in _in_fp8(ratios))


def fp8_to_bf16(report: dict[str, Any]) -> float:
    """Ours in its best FP8 against ours in bf16."""
    ratios = _only(report)["to_ours"]
    return max(ratios[name]["ours bf16"] for name in _in_fp8(ratios))


def share_of_products(report: dict[str, Any]) -> float:
    """Of the card's own speed in matrix products, what ours reaches in bf16."""
    return _only(report)["contenders"]["ours bf16"]["share_of_products"]


def idle(report: dict[str, Any]) -> float:
    """The largest share of a step in which the GPU does nothing, over ours."""
    return max(row["profile"]["idle"] for row in _ours(_only(report)).values())


def tokens_per_second(report: dict[str, Any]) -> float:
    """Of the fastest of ours."""
    return max(row["tokens_per_second"] for row in _ours(_only(report)).values())


def first_losses_agree(report: dict[str, Any]) -> float:
    """1 if both sides start with the same loss in every mode, else 0."""
    agree = [result["first_losses_agree"] for result in report["results"]]
    if None in agree:
        raise KeyError("a mode whose first losses were not compared")
    return float(all(agree))


def gained(result: dict[str, Any]) -> float:
    """Exact answers in percent after training, less those before."""
    return result["em_after"] - result["em_before"]


def formats_that_fail(result: dict[str, Any]) -> float:
    """How many number formats that this machine has did not train."""
    verdicts = [each["verdict"] for each in result["formats"]]
    if "good" not in verdicts:
        raise KeyError("a number format that was tried and trains")
    return float(verdicts.count("bad"))


def failures(named: str = "") -> Callable[[dict[str, Any]], float]:
    """How many tests failed of those with a word in their name."""

    def count(result: dict[str, Any]) -> float:
        found = {name: outcome for name, outcome in result["tests"].items() if named in name}
        failed = sum(outcome in ("failed", "error") for outcome in found.values())
        if "passed" not in found.values() and not failed:
            raise KeyError(f"a test with {named!r} in its name that was run" if named else "a test that was run")
        if not result["whole"] and not failed:
            raise KeyError("the tests that were to come when its time was up")
        return float(failed)

    return count


TARGETS = (
    Target("quickstart: exact answers gained, points", "quickstart", gained, least=1),
    Target("number formats of this card that do not train", "doctor", formats_that_fail, most=1),
    Target("tests/gpu: failures", "tests", failures(), most=1),
    Target("stopped, resumed, and bit for bit as without: failures", "tests", failures("resum"), most=1),
    Target("first losses equal transformers' from the same weights", "bench-same", first_losses_agree, least=1),
    Target("LoRA, all linear layers, bf16: times transformers + peft", "bench-lora", bf16_to_best_other, least=2.0),
    Target("LoRA, all linear layers, FP8: times transformers + peft", "bench-lora", fp8_to_best_other, least=2.4),
    Target("LoRA, all linear layers: idle share of a step", "bench-lora", idle, most=0.05),
    Target("LoRA, attention, bf16: times transformers + peft", "bench-attention", bf16_to_best_other, least=1.5),
    Target("full, 16 microbatches, bf16: times transformers", "bench-full", bf16_to_best_other, least=1.25),
    Target("full, bf16: share of the card's matrix products", "bench-full", share_of_products, least=0.55),
    Target("full, FP8: times our bf16", "bench-full", fp8_to_bf16, least=1.35),
    Target("full: idle share of a step", "bench-full", idle, most=0.05),
    Target("LoRA, 32 layers on one card, 4096 tokens: tokens/s", "bench-32", tokens_per_second, least=6000),
    Target("LoRA, 32 layers on one card, 16384 tokens: tokens/s", "bench-16k", tokens_per_second, least=1),
)


def verdicts(ended: dict[str, dict[str, Any]], targets: tuple[Target, ...] = TARGETS) -> list[dict[str, Any]]:
    """Each target with what was found.

    Args:
        ended: What `run` returned, by part.
        targets: The targets.

    Returns:
        ``target``, ``wanted``, ``found`` (None without a measurement), ``verdict`` (met, missed or not measured) and
        ``why``, if it was not measured.
    """
    rows = []
    for target in targets:
        row: dict[str, Any] = {"target": target.text, "part": target.part, "wanted": target.wanted}
        one = ended.get(target.part)
        if one is None or one["result"] is None:
            why = f"{target.part} was not run" if one is None else f"{target.part}: {one['ended']}"
            rows.append(row | {"found": None, "verdict": "not measured", "why": why})
            continue
        try:
            found = target.value(one["result"])
        except (KeyError, TypeError, ValueError) as error:  # a result without the number
            why = f"{target.part}'s result lacks {error.args[0] if error.args else 'it'}"
            rows.append(row | {"found": None, "verdict": "not measured", "why": why})
            continue
        rows.append(row | {"found": found, "verdict": "met" if target.met_by(found) else "missed", "why": ""})
    return rows


def run(part: Part, command: str, out: Path) -> dict[str, Any]:
    """Run one part and keep what it printed.

    Returns:
        ``ended`` in words, ``seconds``, ``command``, ``result`` (the JSON it ended with, or None).
    """
    (out / f"{part.name}.json").unlink(missing_ok=True)
    words = [sys.executable, *shlex.split(command.format(out=shlex.quote(str(out)), soon=part.limit * 3 // 4))]
    start = time.monotonic()
    with open(out / f"{part.name}.out", "w") as stdout, open(out / f"{part.name}.err", "w") as stderr:
        process = _start(words, stdout, stderr)
        try:
            code = process.wait(part.limit)
            ended = "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            _stop(process, gently=part.gives_up)
            ended = f"not done after {part.limit} s"
    seconds = round(time.monotonic() - start, 1)
    found = {"part": part.name, "ended": ended, "seconds": seconds, "command": words, "result": _result(part, out)}
    (out / f"{part.name}.json").write_text(json.dumps(found, indent=1))
    return found


def _start(words: list[str], stdout: Any, stderr: Any) -> "subprocess.Popen[bytes]":
    """Start a part as a group of its own that Ctrl-C's signal stops, also where a shell's ``&`` has it ignored here."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a new process inherits what is ignored
    try:
        return subprocess.Popen(words, cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(process: "subprocess.Popen[bytes]", *, gently: bool) -> None:
    """End a part and all that it started; gently, as Ctrl-C would at first."""
    if gently:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(part: Part, out: Path) -> Any:
    lines = (out / f"{part.name}.out").read_text().splitlines()
    found = [match.groups() for line in lines if (match := _OUTCOME.match(line))]
    tests = {one or other: str(how or also).lower() for one, how, also, other in found}
    if tests:
        return {"tests": tests, "whole": bool(re.fullmatch(r"=+ .* in [\d.]+s.* =+", lines[-1]))}
    try:
        result = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def summarise(out: Path) -> str:
    """Hold what a folder has against the targets; write summary.json and return the text."""
    ended = {part.name: json.loads(file.read_text()) for part in PARTS if (file := out / f"{part.name}.json").exists()}
    rows = verdicts(ended)
    (out / "summary.json").write_text(json.dumps({"parts": ended, "targets": rows}, indent=1))
    lines = [f"{name:<16}{one['seconds']:>8.1f} s  {one['ended']}" for name, one in ended.items()]
    for row in rows:
        found = f"{row['found']:,.3f}".rstrip("0").rstrip(".") if row["found"] is not None else row["why"]
        lines.append(f"{row['verdict']:<14}{row['target']}: {found} (wanted {row['wanted']})")
    return "\n".join(lines)


def card_gb() -> float | None:
    """Memory of the first GPU, in 1e9 bytes; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def main() -> int:
    """Run the parts that are asked for; 1 if one of them did not end well, 2 without a GPU."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; all without")
    parser.add_argument("--out", type=Path, default=Path("gpu-session"))
    parser.add_argument(
        "--within", type=float, default=math.inf, metavar="SECONDS", help="time limit of all parts together"
    )
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in names]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; use {', '.join(names)}")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if options.summary:
        print(summarise(out))
        return 0
    memory = card_gb()
    if memory is None:
        print("error: gpu_session.py needs a GPU, and this machine has none; --summary reads earlier results.",
              file=sys.stderr)  # fmt: skip
        return 2
    well, end = True, time.monotonic() + options.within
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        command = part.on(memory)
        if not command:
            print(f"{part.name}: needs a card of {LARGE_GB} GB; this one has {memory:.0f}.", flush=True)
            continue
        limit = int(min(part.limit, end - time.monotonic() - _GRACE))
        if limit < _LEAST:
            print(f"{part.name}: not started: --within {options.within:g} is used up.", flush=True)
            continue
        print(f"{part.name}: up to {limit} s ...", flush=True)
        one = run(dataclasses.replace(part, limit=limit), command, out)
        well &= one["ended"] == "done"
        summarise(out)
        print(f"{part.name}: {one['ended']}, {one['seconds']} s", flush=True)
        if one["ended"] != "done":
            print("".join(f"    {line}\n" for line in (out / f"{part.name}.err").read_text().splitlines()[-15:]))
    print(summarise(out))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
