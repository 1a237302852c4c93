"""Locks between processes, of one machine or of all that share a disk.

A lock dies with the process that holds it, and with those that it handed the lock on to (``close_fds=False``).
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mixtral_recipes.errors import EnvironmentProblem, LaunchError
from mixtral_recipes.system import home
from mixtral_recipes.system.files import sibling

_in_use: dict[Path, int] = {}


class _Removed(Exception):
    """The lock file was removed by its last holder between our opening and our locking it."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Let one process, and one thread, at a time make what will be at ``path``; the others wait.

    The lock file, ``.NAME.lock`` beside it, is removed by whoever holds it last.

    Raises:
        EnvironmentProblem: the folder cannot be written to, or its file system has no locks.
    """
    file = sibling(path, f".{path.name}.lock")
    with _locked(file, wait=True):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def held_or_refused(folder: Path, refusal: str) -> Iterator[None]:
    """Hold FOLDER/.lock, for as long as a run writes there.

    Args:
        folder: The folder; made where it is missing.
        refusal: How the error starts where another run holds it.

    Raises:
        LaunchError: another run holds it; the message names that process.
        EnvironmentProblem: the folder cannot be written to, or its file system has no locks.
    """
    from filelock import Timeout

    file = folder / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(file, wait=False))
        except Timeout:
            holder = _holder(file)
            raise LaunchError(
                f"{refusal}{f' ({holder})' if holder else ''}; choose another --name or --dir, or wait for it."
            ) from None
        yield


@contextlib.contextmanager
def _locked(file: Path, *, wait: bool) -> Iterator[None]:
    from filelock import FileLock

    def claim(descriptor: int) -> None:
        if not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat()):
            raise _Removed
        text = f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%F %T')}\n"
        os.set_inheritable(descriptor, True)
        with contextlib.suppress(OSError):  # a lock holds on a full disk too
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)

    # flock(2), never filelock's stand-in for it, which a killed process leaves behind
    lock = FileLock(file, blocking=wait, thread_local=False, fallback_to_soft=False, on_acquired=claim)
    while not lock.is_locked:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))  # filelock tries for ever where none can be made
            lock.acquire()
        except _Removed:
            continue
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            mend = f"{home.elsewhere(file)} that you can write to, on a file system with locks"
            mend = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else mend
            raise EnvironmentProblem(f"{file.parent} cannot be locked ({error.strerror or error}); {mend}.") from error
    try:
        yield
    finally:
        lock.release()


def use(file: Path) -> None:
    """Keep what belongs to a file from being removed (`unused`) until this process ends.

    Whoever calls it looks afterwards whether the file is still there. It does nothing on a file system without locks.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY)
        before, _in_use[file] = _in_use.get(file), descriptor  # the same file, or another one by now
        if before is not None:
            os.close(before)
        fcntl.flock(descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def unused(file: Path) -> Iterator[bool]:
    """Whether no process has called `use` of a file; while this lasts, those that call it wait."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(file.open("rb+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        except OSError as error:  # there may be no such file, or no locks
            unused = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield unused


def _holder(file: Path) -> str:
    """Who wrote its name into a lock file, or an empty string."""
    try:
        return file.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return ""
