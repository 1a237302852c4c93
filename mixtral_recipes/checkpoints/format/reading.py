"""Read stretches of large files: from the page cache where they are in it, else past it.

A model does not fit the cache; letting it through would evict everything else, and would cost a page allocation
and a second copy for every page. So a file that is cached is read from there, and any other with O_DIRECT.
"""

import ctypes
import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable
from typing import BinaryIO

from mixtral_recipes.errors import CheckpointError

BUFFER_BYTES = 4 << 20  # per thread; stays within the last-level cache
BLOCK = 4096  # O_DIRECT alignment that every file system in use accepts
_WINDOWS, _WINDOW_PAGES = 64, 64


class _Inputs:
    """Files opened once for reading, shared by all threads (``pread`` keeps no position)."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> tuple[int, bool]:
        """A descriptor, and whether it reads past the page cache (in aligned blocks only)."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path)
            return self._open[path]

    def through_cache(self, path: str) -> None:
        """Read this file through the cache from now on; other threads may still use the old descriptor."""
        with self._lock:
            if self._open[path][1]:
                self._open[path + "\0direct"] = self._open[path]
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()


def _open(path: str) -> tuple[int, bool]:
    plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if _is_cached(plain):
        return plain, False
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return plain, False  # tmpfs and some network file systems
    os.close(plain)
    return direct, True


def _is_cached(descriptor: int) -> bool:
    """Whether at least half of a file is in the page cache, judged from windows spread over it."""
    size = os.fstat(descriptor).st_size
    pages = size // mmap.PAGESIZE
    if pages < _WINDOW_PAGES:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    windows = min(_WINDOWS, pages // _WINDOW_PAGES)
    resident = 0
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        start = ctypes.addressof(anchor)
        vector = (ctypes.c_ubyte * _WINDOW_PAGES)()
        for window in range(windows):
            page = window * (pages - _WINDOW_PAGES) // max(1, windows - 1)
            address = ctypes.c_void_p(start + page * mmap.PAGESIZE)
            if libc.mincore(address, ctypes.c_size_t(_WINDOW_PAGES * mmap.PAGESIZE), vector):
                return True  # unknown; the cache is the safe choice
            resident += sum(flag & 1 for flag in vector)
        del anchor
    return resident * 2 >= windows * _WINDOW_PAGES


_inputs = _Inputs()
_own = threading.local()
close_inputs = _inputs.close


def read_exactly(path: str, offset: int, out: memoryview) -> None:
    """Fill ``out`` from a file.

    Raises:
        CheckpointError: the file ends before ``out`` is full.
    """
    _fill(path, offset, out, functools.partial(_read_some, path))


def read_through_cache(file: BinaryIO, offset: int, out: memoryview) -> None:
    """As `read_exactly`, from an unbuffered file: for what several processes of a machine read.

    Raises:
        CheckpointError: the file ends before ``out`` is full.
    """
    _fill(file.name, offset, out, lambda at, rest: os.preadv(file.fileno(), [rest], at))


def _fill(path: str, offset: int, out: memoryview, read: Callable[[int, memoryview], int]) -> None:
    done = 0
    while done < len(out):
        got = read(offset + done, out[done:])
        if got == 0:
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}, but a tensor reaches to byte {offset + len(out)}; the file is "
                "truncated: copy or download it again."
            )
        done += got


def _read_some(path: str, offset: int, out: memoryview) -> int:
    descriptor, direct = _inputs.get(path)
    if not direct:
        return os.preadv(descriptor, [out], offset)
    try:
        return _read_past_cache(descriptor, offset, out)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _inputs.through_cache(path)  # took O_DIRECT at open and refuses it now
        return _read_some(path, offset, out)


def _read_past_cache(descriptor: int, offset: int, out: memoryview) -> int:
    """One O_DIRECT read of the blocks around ``out``, through this thread's aligned buffer."""
    if not hasattr(_own, "buffer"):
        _own.buffer = mmap.mmap(-1, BUFFER_BYTES + BLOCK)
    first = offset // BLOCK * BLOCK
    wanted = min(len(_own.buffer), -(-(offset + len(out)) // BLOCK) * BLOCK - first)
    with memoryview(_own.buffer) as buffer:
        got = os.preadv(descriptor, [buffer[:wanted]], first) - (offset - first)
        count = max(0, min(got, len(out)))
        out[:count] = buffer[offset - first : offset - first + count]
    return count
