"""Move tensors from files to files in constant memory: read rows, cast, check, hash, write.

A file to write is a list of `Record`s; a record is a few literal bytes around rows read from elsewhere. Work is cut
into `Run`s, each a contiguous stretch of one file, and spread over threads: reading, hashing and writing all let go of
Python's lock. Output bypasses the page cache where the file system allows it (O_DIRECT), so that a model larger than
memory neither evicts other files from the cache nor waits for write-back at the end.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_recipes.checkpoints.format.output import Output, disk_problem, reserve
from mixtral_recipes.checkpoints.format.reading import BLOCK, close_inputs
from mixtral_recipes.checkpoints.format.rows import (
    ITEM_BYTES,
    Rows,
    is_finite,
    read_rows,
    read_tensor,
    row_bytes_as,
    too_large,
)
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import sync

ALIGNMENT = 64  # of tensor data in a file, as torch.save and safetensors readers like it

_PIECE_BYTES = 256 << 20  # so that several threads can check one file


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


def lay_out(records: Sequence[Record]) -> int:
    """Give every record its offset; returns where the last one ends."""
    start = 0
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
                reserve(path, size)
            if len(runs) == 1:  # in this thread, which may be one that writes while the interpreter comes to its end
                self._write_run(runs[0])
            else:
                self._write_in_threads(runs)
            for path in stops:
                sync(path)
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
        output = Output(run.path, run.start, 2 * widest)  # casting from 16 bits to 32 doubles a row
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

    def _write_rows(self, record: Record, output: Output, pieces: _Pieces) -> None:
        """Write a record's rows; the hash of every canonical tensor among them is noted."""
        hashes = {part.name: hashlib.sha256() for part in record.parts if part.name is not None}
        whole = hashlib.sha256() if len(hashes) > 1 and self.hash_files else None
        for part in record.parts:
            width = row_bytes_as(part.source, record.dtype)
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


class _StoppedError(Exception):
    """Another thread failed; this one merely stops."""


def _why_not_finite(part: Part, start: int, count: int, dtype: str) -> str:
    """What is wrong with rows that are not finite in ``dtype``: they never were, or the type is too small for them."""
    if part.source.dtype != dtype:
        values = read_tensor(part.source, start, count, part.source.dtype).float()
        if values.isfinite().all():
            return f"{part.name}: {too_large(values, dtype)}"
    return f"{part.name}: contains NaN or Inf; such a checkpoint cannot be converted."
