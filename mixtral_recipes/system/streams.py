"""Standard streams as they really are: closed, full, cut off, or of an encoding that lacks a character."""

import contextlib
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Let a process of ours print whatever it likes, wherever its streams lead. Call it first.

    Closed streams lead nowhere from here on: the next file that is opened would otherwise get their number, and be
    written to by every library that prints. What an encoding lacks is written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = _escaping(sys.stdout or open(1, "w"))  # noqa: SIM115
    sys.stderr = _escaping(sys.stderr or open(2, "w"))  # noqa: SIM115


def _escaping(stream: TextIO) -> TextIO:
    if hasattr(stream, "reconfigure"):  # a test's stand-in has none
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where its locale is of another encoding.

    Files are UTF-8 here, whatever the terminal's language; the streams keep its encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def finish() -> OSError | None:
    """Write out what is buffered; the error where a stream did not take it.

    After an error the stream leads nowhere, so that the interpreter does not complain once more at its end.
    """
    problem = None
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            problem = problem or error
            give_up(name)
    return problem


def give_up(name: str) -> None:
    """Let ``stdout`` or ``stderr`` lead nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, {"stdout": 1, "stderr": 2}[name])
        os.close(nowhere)
