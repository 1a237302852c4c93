"""Try imports in child processes: a broken package may print, hang or crash, and `doctor` should report that.

One child imports several packages in turn, so that what they share (torch) is imported once. After a failure, the
rest are tried in a new child, because a failed import leaves modules behind.
"""

import concurrent.futures
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

TIMEOUT_S = 120

# Reads [[name, code], ...]; answers with a line of JSON for each on what was its stdout. Libraries' prints go nowhere.
_CHILD = """
import gc, json, os, sys
gc.disable()
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name, code in json.loads(sys.argv[1]):
    found = {}
    try:
        exec(code, found)
        good, text = True, str(found.get("answer", ""))
    except BaseException as error:
        good, text = False, f"{type(error).__name__}: {error}"
    print(json.dumps([name, good, text]), file=answers)
    if not good:
        break
sys.stderr.flush()
os._exit(0)  # nothing to tidy up, and taking torch down takes a while
"""


class Answer(NamedTuple):
    """Whether a probe's code ran, and its ``answer`` or what went wrong."""

    good: bool
    text: str


def ask(groups: Sequence[Mapping[str, str]], *, timeout: float = TIMEOUT_S) -> dict[str, Answer]:
    """Run code in child processes, the groups at the same time, each group's probes one after the other.

    Args:
        groups: Name of a probe -> Python code, which may set ``answer``.
        timeout: Seconds one probe may take.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, len(groups))) as pool:
        answers: dict[str, Answer] = {}
        for of_group in pool.map(lambda group: _ask_in_turn(dict(group), timeout), groups):
            answers |= of_group
    return answers


def _ask_in_turn(waiting: dict[str, str], timeout: float) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    while waiting:
        for name, answer in _ask_child(waiting, timeout).items():
            answers[name] = answer
            del waiting[name]
    return answers


def _ask_child(probes: dict[str, str], timeout: float) -> dict[str, Answer]:
    """The answers of one child: to all probes, or up to the first that fails."""
    argv = [sys.executable, "-c", _CHILD, json.dumps(list(probes.items()))]
    answers: dict[str, Answer] = {}
    with tempfile.TemporaryFile() as errors, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors) as child:
        assert child.stdout is not None
        for name in probes:
            line = _line(child.stdout, timeout)
            if line is None:
                child.kill()
                answers[name] = Answer(False, f"no answer within {timeout:g} s")
                break
            if not line:
                answers[name] = Answer(False, _last_words(child, errors))
                break
            _, good, text = json.loads(line)
            answers[name] = Answer(good, text.strip().splitlines()[-1] if text.strip() else "")
            if not good:
                break
    return answers


def _line(pipe: IO[bytes], timeout: float) -> bytes | None:
    """The next line; empty when the child has ended, None when time is up."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return pipe.readline() if selector.select(timeout) else None


def _last_words(child: "subprocess.Popen[bytes]", errors: IO[bytes]) -> str:
    code = child.wait()
    errors.seek(0)
    lines = os.fsdecode(errors.read()).strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"
