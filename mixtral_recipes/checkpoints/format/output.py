"""A file that several threads write, each a stretch of it, past the page cache where the file system allows it."""

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

from mixtral_recipes.checkpoints.format.reading import BLOCK, BUFFER_BYTES
from mixtral_recipes.errors import EnvironmentProblem


class Output:
    """A buffered, block-aligned writer over one stretch of a file."""

    def __init__(self, path: Path, start: int, widest_row: int) -> None:
        """Open a file.

        Args:
            path: The file; made if it is not there.
            start: Where the stretch begins.
            widest_row: The most bytes that `room` is asked for.
        """
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._direct = _open_direct(path)
        capacity = -(-(BUFFER_BYTES + widest_row) // BLOCK) * BLOCK
        self._memory = mmap.mmap(-1, capacity)  # page-aligned, as O_DIRECT wants
        self._view = memoryview(self._memory)
        self._base = start // BLOCK * BLOCK
        self._first = self._fill = start - self._base  # a neighbour writes what comes before _first

    @property
    def position(self) -> int:
        return self._base + self._fill

    def room(self, at_least: int) -> memoryview:
        """Free buffer space, at least ``at_least`` bytes of it (no more than the widest row)."""
        if len(self._view) - self._fill < at_least:
            self._flush(self._fill // BLOCK * BLOCK)
        return self._view[self._fill :]

    def advance(self, count: int) -> None:
        """Take the first ``count`` bytes of `room` as written."""
        self._fill += count

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            room = self.room(1)
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.advance(count)
            view = view[count:]

    def _flush(self, stop: int) -> None:
        start, self._first = self._first, 0
        aligned = -(-start // BLOCK) * BLOCK
        if start < aligned:
            _write(self._plain, self._view[start : min(aligned, stop)], self._base + start)
        whole = stop // BLOCK * BLOCK
        if aligned < whole:
            self._write_blocks(self._view[aligned:whole], self._base + aligned)
        if max(aligned, whole) < stop:
            _write(self._plain, self._view[max(aligned, whole) : stop], self._base + max(aligned, whole))
        rest = self._fill - stop
        self._view[:rest] = bytes(self._view[stop : self._fill])
        self._base += stop
        self._fill = rest

    def _write_blocks(self, view: memoryview, offset: int) -> None:
        if self._direct is None:
            _write(self._plain, view, offset)
            return
        try:
            _write(self._direct, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)  # the file system took O_DIRECT at open and refuses it now
            self._direct = None
            _write(self._plain, view, offset)

    def finish(self) -> None:
        """Write what is left; through the page cache, also see to it that write-back does not wait for the end."""
        self._flush(self._fill)
        if self._direct is None:
            os.fsync(self._plain)

    def close(self) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)
        self._view.release()
        with contextlib.suppress(BufferError):  # an exception's traceback may still hold a slice
            self._memory.close()


def reserve(path: Path, size: int) -> None:
    """Give a file its room on the disk.

    Where a block has none yet, ext4 and others let one O_DIRECT write at a time into a file: several threads would wait
    for each other. And a disk too full is found out at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if size and libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            error = ctypes.get_errno()
            if error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # any other: blocks get their room when written
                raise OSError(error, os.strerror(error), str(path))
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None  # tmpfs and some network file systems


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def disk_problem(error: OSError) -> EnvironmentProblem | OSError:
    """An OSError about disk space as one line the user can act on; any other one unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return EnvironmentProblem(
            f"the disk is full{where}; no incomplete result was left behind. Free some space or choose another folder."
        )
    return error
