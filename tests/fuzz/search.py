"""Draw examples, and keep the shortest one of each kind of fault.

Hypothesis draws them and could shrink them too; here a search goes on after a fault, to find the others.
"""

import base64
import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "6"))
_ROUND = 100  # examples drawn under one seed, where there is a time to spend


@dataclass
class Fault:
    """One kind of fault: what was told of it, and the shortest example."""

    text: str
    example: Any
    times: int = 1


def search(strategy: Any, faults_of: Callable[[Any], dict[str, str]], title: str) -> dict[str, Fault]:
    """Try examples, for `FUZZ_SECONDS` or a fixed few.

    Args:
        strategy: Draws them.
        faults_of: What is wrong with one, by a name that stays the same for the same fault.
        title: What is fuzzed.

    Returns:
        The faults by name.
    """
    found: dict[str, Fault] = {}
    tried = 0

    def attempt(example: Any) -> None:
        nonlocal tried
        if SECONDS and time.monotonic() > end:
            return
        tried += 1
        _note(title, example)
        for name, text in faults_of(example).items():
            known = found.setdefault(name, Fault(text, example, 0))
            known.times += 1
            if len(example) < len(known.example):
                known.text, known.example = text, example

    end = time.monotonic() + SECONDS
    seed = int(os.environ.get("FUZZ_SEED", "0")) or (time.time_ns() % 10**9 if SECONDS else 0)
    while True:
        _drawn(strategy, attempt, seed)
        seed += 1
        if time.monotonic() >= end:
            break
    if folder := os.environ.get("FUZZ_FOUND"):
        _keep(Path(folder), title, found, tried)
    return found


def _drawn(strategy: Any, attempt: Callable[[Any], None], seed: int) -> None:
    settings = hypothesis.settings(
        max_examples=_ROUND if SECONDS else EXAMPLES,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(settings(hypothesis.given(strategy)(attempt)))()


def told(found: dict[str, Fault]) -> str:
    """The faults as a failed test shows them."""
    return "\n".join(
        f"{name} ({fault.times} times): {fault.text}\n   by {fault.example[:300]!r}" for name, fault in found.items()
    )


def packed(title: str, example: Any) -> str:
    """An example as a file of the corpus."""
    if isinstance(example, bytes):
        try:
            content: Any = {"text": example.decode()}
        except UnicodeDecodeError:
            content = {"zlib": base64.b85encode(zlib.compress(example, 9)).decode()}
    else:
        content = {"words": example}
    return json.dumps({"surface": title, **content}, indent=1) + "\n"


def unpacked(text: str) -> tuple[str, Any]:
    """What `packed` took."""
    plain = json.loads(text)
    if "words" in plain:
        return plain["surface"], plain["words"]
    return plain["surface"], plain["text"].encode() if "text" in plain else zlib.decompress(
        base64.b85decode(plain["zlib"])
    )


def _note(title: str, example: Any) -> None:
    """The example at work, where it can be found if it ends the process."""
    if folder := os.environ.get("FUZZ_FOUND"):
        Path(folder, "at-work.json").write_text(packed(title, example))


def _keep(folder: Path, title: str, found: dict[str, Fault], tried: int) -> None:
    with (folder / "tried.jsonl").open("a") as file:
        file.write(
            json.dumps({"surface": title, "tried": tried, "faults": {n: f.times for n, f in found.items()}}) + "\n"
        )
    for number, (name, fault) in enumerate(found.items()):
        stem = f"{title.replace('/', '-')}-{number}"
        (folder / f"{stem}.json").write_text(packed(title, fault.example))
        (folder / f"{stem}.txt").write_text(f"{name} ({fault.times} times)\n{fault.text}\n")
