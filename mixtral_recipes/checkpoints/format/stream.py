"""Move tensors from files to files in constant memory: read rows, cast, check, hash, write.

A file to write is a list of `Record`s; a record is a few literal bytes around rows read from elsewhere. Work is cut
into `Run`s, each a contiguous stretch of one file, and spread over threads: reading, hashing and writing all let go of
Python's lock. Output bypasses the page cache where the file system allows it (O_DIRECT), so that a model larger than
memory neither evicts other files from the cache nor waits for write-back at the end.
"""

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mixtral_recipes.checkpoints.format.reading import BLOCK, BUFFER_BYTES, close_inputs, read_exactly
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem
from mixtral_recipes.system.files import sync_file

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # of tensor data in a file, as torch.save and safetensors readers like it

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # safetensors' spelling of the dtypes a weight may have
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_PIECE_BYTES = 256 << 20  # so that several threads can check one file
# Largest magnitude pattern that is finite, plus one: Inf and NaN have every exponent bit set.
_NOT_FINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


class Rows(Protocol):
    """A two-dimensional tensor that can be read a few rows at a time."""

    @property
    def dtype(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with rows ``start`` to ``start + count``."""
        ...


@dataclass(frozen=True)
class Extent:
    """A tensor stored row after row at one place in a file."""

    path: str
    offset: int
    dtype: str
    rows: int
    row_bytes: int

    def read(self, start: int, count: int, out: memoryview) -> None:
        read_exactly(self.path, self.offset + start * self.row_bytes, out[: count * self.row_bytes])

    def slice(self, start: int, rows: int) -> "Extent":
        """``rows`` rows from row ``start`` on, as a tensor of their own."""
        return Extent(self.path, self.offset + start * self.row_bytes, self.dtype, rows, self.row_bytes)


class TensorRows:
    """A tensor's elements in order, one a row; on any device."""

    def __init__(self, tensor: "Tensor") -> None:
        self._flat = tensor.detach().reshape(-1)
        self.dtype = str(self._flat.dtype)
        self.rows = self._flat.numel()
        self.row_bytes = self._flat.element_size()

    def read(self, start: int, count: int, out: memoryview) -> None:
        """Fill ``out`` with elements ``start`` to ``start + count``."""
        import torch

        target = torch.frombuffer(out, dtype=self._flat.dtype, count=count)
        target.copy_(self._flat[start : start + count])


@dataclass(frozen=True)
class Part:
    """Rows of a source.

    Attributes:
        name: The canonical tensor they belong to, whose hash they enter and which must be finite; None for a run's own
            state, of which neither is asked. Rows in a type of GGUF's were looked at when they were encoded.
    """

    name: str | None
    source: Rows
    start: int
    stop: int


@dataclass
class Record:
    """Something contiguous in a file: literal bytes, rows of other files, literal bytes.

    Attributes:
        nbytes: Size of the rows once cast.
        offset: Where the record begins in its file; set when the file is laid out.
        align: The record begins at a multiple of this.
    """

    prefix: bytes = b""
    parts: Sequence[Part] = ()
    suffix: bytes = b""
    dtype: str = "BF16"
    nbytes: int = 0
    align: int = 1
    offset: int = 0

    @property
    def length(self) -> int:
        return len(self.prefix) + self.nbytes + len(self.suffix)


@dataclass
class Run:
    """A stretch of one file, written front to back by one thread.

    Attributes:
        hashes: Length and SHA-256 of every piece written, in order and without gaps; filled when the run is done. The
            rows of a record of canonical tensors are a piece; so is what lies between, every 256 MiB of it at most.
    """

    path: Path
    records: list[Record]
    start: int = 0
    hashes: list[tuple[int, str]] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.records[-1].offset + self.records[-1].length if self.records else self.start


class _Pieces:
    """Hashes what is written of a run, piece by piece."""

    def __init__(self, hashes: list[tuple[int, str]]) -> None:
        self._hashes = hashes
        self._digest, self._length = hashlib.sha256(), 0

    def update(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._length += len(data)
        if self._length >= _PIECE_BYTES:
            self.cut()

    def add(self, length: int, digest: str) -> None:
        """A piece that was hashed already."""
        self.cut()
        self._hashes.append((length, digest))

    def cut(self) -> None:
        """The next byte begins a piece."""
        if self._length:
            self._hashes.append((self._length, self._digest.hexdigest()))
            self._digest, self._length = hashlib.sha256(), 0


def lay_out(records: Sequence[Record], start: int = 0) -> int:
    """Give every record its offset; returns where the last one ends."""
    for record in records:
        start = -(-start // record.align) * record.align
        record.offset = start
        start += record.length
    return start


def stretches(path: Path, records: Sequence[Record], longest: int) -> list[Run]:
    """Cut a file's records, which are laid out, into runs of about ``longest`` bytes."""
    runs: list[Run] = []
    for record in records:
        if not runs or record.offset + record.length - runs[-1].start > longest:
            # What stands between two records is written by the run of the second.
            runs.append(Run(path, [], start=runs[-1].stop if runs else record.offset))
        runs[-1].records.append(record)
    return runs


class _Output:
    """A buffered, block-aligned writer over one stretch of a file."""

    def __init__(self, run: Run, widest_row: int) -> None:
        self._plain = os.open(run.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._direct = _open_direct(run.path)
        capacity = -(-(BUFFER_BYTES + widest_row) // BLOCK) * BLOCK
        self._memory = mmap.mmap(-1, capacity)  # page-aligned, as O_DIRECT wants
        self._view = memoryview(self._memory)
        self._base = run.start // BLOCK * BLOCK
        self._first = self._fill = run.start - self._base  # a neighbour writes what comes before _first

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


def _reserve(path: Path, size: int) -> None:
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


@dataclass
class Stream:
    """What a streaming job shares: threads, progress, and the hashes it gathers.

    Attributes:
        threads: How many runs are written at once.
        on_bytes: Called with the number of bytes each time some are read (from any thread).
        hash_files: Whether the pieces of files are hashed, besides canonical tensors.
        digests: SHA-256 of every canonical tensor as written, by name.
    """

    threads: int
    on_bytes: Callable[[int], None] = lambda count: None
    hash_files: bool = True
    digests: dict[str, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def write(self, runs: Sequence[Run]) -> None:
        """Write every run, and make the files durable; the first failure stops all.

        Raises:
            CheckpointError: a source is truncated, or holds NaN or Inf.
            EnvironmentProblem: the disk is full.
        """
        stops: dict[Path, int] = {}
        for run in runs:
            stops[run.path] = max(run.stop, stops.get(run.path, 0))
        try:
            for path, size in stops.items():
                _reserve(path, size)
            if len(runs) == 1:  # in this thread, which may be one that writes while the interpreter comes to its end
                self._write_run(runs[0])
            else:
                self._write_in_threads(runs)
            for path in stops:
                sync_file(path)
        except OSError as error:
            raise disk_problem(error) from error
        finally:
            close_inputs()

    def _write_in_threads(self, runs: Sequence[Run]) -> None:
        with ThreadPoolExecutor(max(1, min(self.threads, len(runs)))) as pool:
            jobs = [pool.submit(self._write_run, run) for run in runs]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                if any(job.exception() for job in done):
                    self._stop.set()
            except BaseException:
                self._stop.set()
                raise
        errors = [error for job in jobs if (error := job.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def _write_run(self, run: Run) -> None:
        widest = max((part.source.row_bytes for record in run.records for part in record.parts), default=BLOCK)
        output = _Output(run, 2 * widest)  # casting from 16 bits to 32 doubles a row
        pieces = _Pieces(run.hashes)
        try:
            for record in run.records:
                literal = bytes(record.offset - output.position) + record.prefix
                output.append(literal)
                pieces.update(literal)
                self._write_rows(record, output, pieces)
                output.append(record.suffix)
                pieces.update(record.suffix)
            pieces.cut()
            output.finish()
        finally:
            output.close()

    def _write_rows(self, record: Record, output: _Output, pieces: _Pieces) -> None:
        """Write a record's rows; the hash of every canonical tensor among them is noted."""
        hashes = {part.name: hashlib.sha256() for part in record.parts if part.name is not None}
        whole = hashlib.sha256() if len(hashes) > 1 and self.hash_files else None
        for part in record.parts:
            width = _width(part.source, record.dtype)
            row = part.start
            while row < part.stop:
                if self._stop.is_set():
                    raise _StoppedError
                room = output.room(width)
                count = min(part.stop - row, len(room) // width)
                rows = room[: count * width]
                read_rows(part.source, row, count, rows, record.dtype)
                if part.name is None:
                    pieces.update(rows)
                else:
                    if record.dtype in ITEM_BYTES and not is_finite(rows, record.dtype):
                        raise CheckpointError(_why_not_finite(part, row, count, record.dtype))
                    hashes[part.name].update(rows)
                if whole:
                    whole.update(rows)
                output.advance(len(rows))
                self.on_bytes(len(rows))
                row += count
        self.digests.update((name, digest.hexdigest()) for name, digest in hashes.items())
        if hashes and self.hash_files:
            pieces.add(record.nbytes, (whole or next(iter(hashes.values()))).hexdigest())


def _width(source: Rows, dtype: str) -> int:
    """Bytes of a row once cast."""
    if source.dtype == dtype:
        return source.row_bytes
    return source.row_bytes * ITEM_BYTES[dtype] // ITEM_BYTES[source.dtype]


class _StoppedError(Exception):
    """Another thread failed; this one merely stops."""


def disk_problem(error: OSError) -> EnvironmentProblem | OSError:
    """An OSError about disk space as one line the user can act on; any other one unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return EnvironmentProblem(
            f"the disk is full{where}; nothing was left under the final name. Free some room or choose another folder."
        )
    return error


def read_rows(source: Rows, start: int, count: int, out: memoryview, dtype: str) -> None:
    """Read rows, cast to ``dtype`` on the way."""
    if source.dtype == dtype:
        source.read(start, count, out)
        return
    import torch

    scratch = bytearray(count * source.row_bytes)
    source.read(start, count, memoryview(scratch))
    read = torch.frombuffer(scratch, dtype=getattr(torch, TORCH_NAMES[source.dtype]))
    np.frombuffer(out, dtype=np.uint8)[:] = read.to(getattr(torch, TORCH_NAMES[dtype])).view(torch.uint8).numpy()


def is_finite(data: memoryview, dtype: str) -> bool:
    """Whether no value is NaN or Inf.

    A float's bits, read as an integer, grow with its magnitude: the largest signed value finds the worst positive
    number, the largest unsigned one the worst negative. Two passes that run at the speed of the cache.
    """
    bits = 8 * ITEM_BYTES[dtype]
    limit = _NOT_FINITE[dtype]
    signed = np.frombuffer(data, dtype=f"i{bits // 8}")
    return not signed.size or bool(
        signed.max() < limit and signed.view(f"u{bits // 8}").max() < limit + (1 << (bits - 1))
    )


def _why_not_finite(part: Part, start: int, count: int, dtype: str) -> str:
    """What is wrong with rows that are not finite in ``dtype``: they never were, or the type is too small for them."""
    import torch

    if part.source.dtype != dtype:
        read = bytearray(count * part.source.row_bytes)
        part.source.read(start, count, memoryview(read))
        if is_finite(memoryview(read), part.source.dtype):
            values = torch.frombuffer(read, dtype=getattr(torch, TORCH_NAMES[part.source.dtype])).float()
            return f"{part.name}: {too_large(values, dtype)}"
    return f"{part.name}: holds NaN or Inf; a checkpoint with such a weight is not converted."


def too_large(values: "Tensor", dtype: str) -> str:
    """What to say of values that a type is too small for.

    Args:
        values: Finite ones, the too large one among them.
        dtype: The type.
    """
    import torch

    short = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    largest = values.flatten()[values.abs().argmax()].item()
    most = torch.finfo(getattr(torch, TORCH_NAMES[dtype])).max
    others = " or ".join(name for key, name in short.items() if key != dtype and key != "F16")
    return f"holds {largest:.5g}, more than {short[dtype]} can ({most:.5g}); use --dtype {others}."
