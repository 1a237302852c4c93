"""What reading files told, remembered for as long as they cannot have changed.

A file's size and modification time are what its writer says they are: ``cp -p``, ``rsync -t`` and ``touch -r`` set
them. The time of change (ctime) is the file system's own: whatever writes to a file, or puts another in its place,
moves it on.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system.files import write_text
from mixtral_recipes.system.locks import held

# Two writes within a tick of the file system's clock leave one time of change: a file that young is not remembered.
_SETTLED_AFTER_S = 1.0


def remembered(home: Path, files: Sequence[Path], question: str, look: Callable[[], str]) -> str:
    """An answer that depends on files' content alone, found out in the first process that asks.

    Args:
        home: Where answers are kept.
        files: What the answer depends on.
        question: What is asked, and all else that the answer depends on.
        look: Reads the files.
    """
    memo = _memo(home, question, state_of(files))
    if (known := _read(memo)) is not None:
        return known
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(memo))
        except EnvironmentProblem:  # nothing can be kept there
            return look()
        if (known := _read(memo)) is not None:
            return known
        before = settled_state(files)
        answer = look()
        remember(home, files, question, answer, since=before)
        return answer


def remember(home: Path, files: Sequence[Path], question: str, answer: str, *, since: str | None) -> None:
    """Keep an answer that was found out while files were read, unless they may have changed meanwhile, or it cannot be.

    Args:
        home: As for `remembered`.
        files: As for `remembered`.
        question: As for `remembered`.
        answer: What they told.
        since: `settled_state` before they were read.
    """
    if since is not None and state_of(files) == since:
        with contextlib.suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            write_text(_memo(home, question, since), f"{answer}\n{_digest(answer)}")


def settled_state(files: Sequence[Path]) -> str | None:
    """`state_of`; None while a file is so young that it could change once more without a trace."""
    state = state_of(files)
    return state if all(time.time() - file.stat().st_ctime > _SETTLED_AFTER_S for file in files) else None


def state_of(files: Sequence[Path]) -> str:
    """A hash that changes whenever one of the files is written to or replaced, and at times when it is not."""
    found = []
    for file in files:
        stat = file.stat()
        found.append((str(file.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _read(memo: Path) -> str | None:
    """The answer in a file; None where there is none, or it is damaged."""
    if not memo.is_file():
        return None
    answer, _, digest = memo.read_text(errors="replace").rpartition("\n")
    return answer if digest == _digest(answer) else None


def _digest(answer: str) -> str:
    return hashlib.sha256(answer.encode(errors="replace")).hexdigest()


def _memo(home: Path, question: str, state: str) -> Path:
    return home / hashlib.sha256(f"{question}\n{state}".encode()).hexdigest()[:32]
