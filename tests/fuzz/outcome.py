"""Run a command in this process, and say what is wrong with how it ended.

A command that is given anything at all ends with exit code 0, or with 2 and one line that begins with ``error:``; it
never reaches the last except of `cli.main` (a defect), takes 20 seconds or a gibibyte, writes outside its places, opens
a connection or starts a program.
"""

import contextlib
import faulthandler
import io
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20
MEMORY = 1 << 30
LONGEST_LINE = 4000  # characters of an error
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.rmtree",
)  # fmt: skip
_STARTS = ("subprocess.Popen", "os.posix_spawn")  # from Python 3.13 on the first calls the second
_NEVER = (*_STARTS, "os.system", "os.exec", "socket.connect", "socket.getaddrinfo")


OUTSIDE = "writes outside of its places"


class TookTooLong(BaseException):
    """Passes every ``except Exception``."""


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code; None where it did not return.
        text: What it wrote.
        faults: What is wrong with that, each with a short name that stays the same for the same fault.
    """

    code: int | None
    text: str
    faults: dict[str, str] = field(default_factory=dict)


@dataclass
class _Watch:
    """What the audit hook looks for; hooks cannot be removed, so there is one, which rests while ``places`` is None."""

    places: tuple[str, ...] | None = None
    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.places is None:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self._written(event, path)
        elif event in _CHANGES:
            in_open_folder = isinstance(args[-1], int) and args[-1] != -1 and event != "os.chmod"
            if not in_open_folder:  # which is one that was opened by its path
                self._written(event, args[0])
        elif event in _NEVER and not (event in _STARTS and _harmless(args[1])):
            self.seen.setdefault(f"{event} was called", str(args)[:300])
            raise PermissionError(1, "not while this is tested")

    def _written(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        at = os.path.abspath(os.fsdecode(path))
        if at.startswith((*(self.places or ()), "/dev/null")) or "__pycache__" in at:
            return
        if event != "os.mkdir" or not os.path.isdir(at):
            self.seen.setdefault(OUTSIDE, f"{event} {at}")
            raise PermissionError(1, "not while this is tested", at)


def _harmless(words: Any) -> bool:
    """What packaging, matplotlib and nemo_run ask, without anything a shell reads; and what removes our own folders."""
    if words[:2] == ["/bin/sh", "-c"] and len(words) == 4:
        return words[2] == 'read _; rm -rf -- "$0"' and "/mixtral-recipes-" in words[3]
    return words[0] in ("git", "fc-list") or re.fullmatch(r"(mkdir|tar|rm|cp) [\w./ =-]+", words[-1]) is not None


_WATCH = _Watch()
_hooked = False


def run(words: list[str], places: list[Path]) -> Outcome:
    """Run one command line.

    Args:
        words: Arguments, without the program's name.
        places: The folders it may write in.
    """
    from mixtral_recipes.cli import main

    out = io.StringIO()
    with _bounds(places), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, fault = _called(main.run, words)
    found = Outcome(code, out.getvalue(), dict(_WATCH.seen))
    found.faults |= fault | _told_badly(found)
    if (peak := _peak()) > MEMORY:
        found.faults["memory"] = f"{peak >> 20} MiB"
    if code == 1 and "--debug" not in words:
        found.faults |= _origin(words, places)
    return found


def _called(function: Any, words: list[str]) -> tuple[int | None, dict[str, str]]:
    try:
        return function(words), {}
    except TookTooLong:
        return None, {f"took more than {SECONDS} seconds in {_place(sys.exc_info()[2])}": ""}
    except SystemExit as error:
        return (error.code if isinstance(error.code, int) else 1), {}
    except BaseException as error:
        return None, {f"{type(error).__name__} in {_place(error.__traceback__)}": str(error)[:500]}


def _told_badly(found: Outcome) -> dict[str, str]:
    faults = {}
    last = found.text.rstrip("\n").rpartition("\n")[2]
    if "Traceback (most recent call last)" in found.text:
        faults["a traceback"] = found.text[-500:]
    if found.code == 2 and not last.startswith("error: ") and "Usage:" not in found.text:
        faults["exit code 2 without a last line that says why"] = found.text[-500:]
    if found.code == 2 and len(last) > LONGEST_LINE:
        faults["an error of more than a few lines"] = f"{len(last)} characters: {last[:200]}"
    if "out of memory" in last or "can't allocate memory" in last:
        faults["memory"] = last[:300]
    if control := _CONTROL.search(found.text):
        faults["a control character reached the terminal"] = ascii(
            found.text[max(0, control.start() - 200) : control.end() + 50]
        )
    if found.code not in (0, 1, 2, None):
        faults[f"exit code {found.code}"] = found.text[-500:]
    return faults


def _origin(words: list[str], places: list[Path]) -> dict[str, str]:
    """Where the error comes from that reached the last except: the command once more, with ``--debug``."""
    again = run([*words, "--debug"], places)
    return {f"a defect: {name}": text for name, text in again.faults.items() if " in " in name} or {
        "a defect, once": again.text[-500:]
    }


def _place(trace: Any) -> str:
    """The last line of ours that an error passed."""
    frames = [f for f in traceback.extract_tb(trace) if "/mixtral_recipes/" in f.filename or "/fuzz/" in f.filename]
    ours = [f for f in frames if "site-packages" not in f.filename] or traceback.extract_tb(trace)
    name = ours[-1].filename.rpartition("/mixtral_recipes/")[2]
    return f"{name}:{ours[-1].name}"


@contextlib.contextmanager
def _bounds(places: list[Path]) -> Iterator[None]:
    global _hooked
    if not _hooked:
        sys.addaudithook(_WATCH)
        _hooked = True
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, _stop)
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True, file=sys.__stderr__)  # where not even a signal is heard
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + 2 * MEMORY, hard))  # the machine is others' too
    _forget_peak()
    _WATCH.seen, _WATCH.places = {}, tuple(str(place) for place in places)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _WATCH.places = None
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        faulthandler.cancel_dump_traceback_later()


def _stop(*_: Any) -> None:
    raise TookTooLong


_resident = 0


def _forget_peak() -> None:
    global _resident
    Path("/proc/self/clear_refs").write_text("5")
    _resident = _status("VmRSS")


def _peak() -> int:
    """Bytes of resident memory above what there was, at most."""
    return max(0, _status("VmHWM") - _resident)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    return 0
