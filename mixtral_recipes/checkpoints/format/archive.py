"""The archive ``torch.save`` makes of tensors: what surrounds the numbers, and where they are.

An item of a ``.distcp`` file is such an archive, and so is a ``.bin`` file: a zip in which nothing is compressed, of a
pickle that describes the tensors, a record of each one's bytes, and a few short ones. The writer needs the frame around
the bytes, the reader the place of the bytes; neither needs torch to load or save anything.
"""

import bisect
import contextlib
import functools
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch

from mixtral_recipes.checkpoints.format.restricted_pickle import Described, described, settings_in
from mixtral_recipes.checkpoints.format.shard import Shape
from mixtral_recipes.errors import CheckpointError

_MOST_BYTES = 1 << 24  # of a pickle, which has 150 for each tensor, and of an archive's directory: 60 for each record
_LOCAL_HEADER = 30  # then the name and the extra field, whose lengths are its last four bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an archive.

    Attributes:
        dtype: Of its elements.
        shape: Its shape; the elements lie in order.
        start: The first element's byte, counted from the archive's.
    """

    dtype: torch.dtype
    shape: Shape
    start: int


def find_tensor(file: BinaryIO, offset: int, length: int) -> StoredTensor:
    """Where a tensor's elements are, as the archive itself says.

    Args:
        file: Holds the archive.
        offset: The archive's first byte.
        length: Its bytes.

    Raises:
        CheckpointError: it is not an archive of one plain contiguous tensor, or a record of it is compressed or reaches
            beyond its end; the text goes on after "cannot be read".
    """
    with _reading(file, offset, length) as records:
        tensor = records.description()
        if not isinstance(tensor, Described):
            raise CheckpointError("its pickle describes no tensor")
        return records.find(tensor)


def find_tensors(file: BinaryIO, length: int) -> dict[str, StoredTensor]:
    """Where the elements of every tensor of a saved state dict are, as the archive itself says.

    Args:
        file: The archive.
        length: Its bytes.

    Raises:
        CheckpointError: as `find_tensor`, of any of the tensors.
    """
    with _reading(file, 0, length) as records:
        tensors = records.description()
        if not isinstance(tensors, dict):
            raise CheckpointError(f"it contains a {type(tensors).__name__}, not a dictionary of tensors")
        found: dict[str, StoredTensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Described):
                raise CheckpointError(f"{name} is a {type(tensor).__name__}, not a tensor")
            try:
                found[name] = records.find(tensor)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error
        return found


def read_settings(file: BinaryIO, offset: int, length: int) -> Any:
    """What an archive of settings holds (`settings_in`).

    Args:
        file: Holds the archive.
        offset: The archive's first byte.
        length: Its bytes.

    Raises:
        CheckpointError: it is not an archive, or is damaged; the text goes on after "cannot be read".
    """
    with _reading(file, offset, length) as records:
        return settings_in(records.pickle())


@contextlib.contextmanager
def _reading(file: BinaryIO, offset: int, length: int) -> Iterator["_Records"]:
    """An archive's records; whatever a damaged one raises is a CheckpointError."""
    try:
        window = _Window(file, offset, length)
        with zipfile.ZipFile(cast(Any, window)) as archive:
            yield _Records(archive, window, length)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise CheckpointError(f"{type(error).__name__}: {error}") from error


class _Records:
    """The records of an archive, by their names without the archive's own.

    Their places are read from the archive's directory and from each record's own header, which must agree: torch
    calculates where it would have put them, which is wrong for an archive that was aligned or zipped otherwise.
    """

    def __init__(self, archive: zipfile.ZipFile, window: "_Window", length: int) -> None:
        self._archive, self._window, self._length = archive, window, length
        self._records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if len(self._records) != len(archive.infolist()):
            raise CheckpointError("two of its records have the same name")
        self._starts = [*sorted(record.header_offset for record in archive.infolist()), archive.start_dir]
        order = self._read("byteorder", 16) if "byteorder" in self._records else b"little"
        if order != b"little":
            raise CheckpointError(
                "its bytes are in big-endian order" if order == b"big" else "its byteorder is invalid"
            )

    def pickle(self) -> bytes:
        """What describes the rest."""
        return self._read("data.pkl", _MOST_BYTES)

    def description(self) -> Any:
        """What its pickle says of tensors."""
        return described(self.pickle())

    def find(self, tensor: Described) -> StoredTensor:
        """Where a tensor's elements are."""
        if not tensor.in_order:
            raise CheckpointError("is transposed or strided; save it contiguous")
        record = self._plain(f"data/{tensor.record}", self._length)
        first = tensor.offset * tensor.dtype.itemsize
        if first + math.prod(tensor.shape) * tensor.dtype.itemsize > record.file_size:
            raise CheckpointError("needs more bytes than its record has")
        return StoredTensor(tensor.dtype, tensor.shape, self._start(record) + first)

    def _read(self, name: str, most: int) -> bytes:
        return self._archive.read(self._plain(name, most))

    def _plain(self, name: str, most: int) -> zipfile.ZipInfo:
        """A record that lies in the archive as it is."""
        record = self._records.get(name)
        if record is None:
            raise CheckpointError(f"it has no record {name}")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise CheckpointError(f"its record {record.filename} is compressed or encrypted")
        if record.file_size != record.compress_size or record.file_size > most:
            raise CheckpointError(f"its record {record.filename} cannot have {record.file_size} bytes")
        return record

    def _start(self, record: zipfile.ZipInfo) -> int:
        """The first byte of a record."""
        self._window.seek(record.header_offset)
        header = self._window.read(_LOCAL_HEADER)
        compression, name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (8, 26, 28))
        spelled = record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437")
        if header[:4] != b"PK\3\4" or compression != zipfile.ZIP_STORED or self._window.read(name) != spelled:
            raise CheckpointError(f"its directory and the header of its record {record.filename} differ")
        start = record.header_offset + _LOCAL_HEADER + name + extra
        following = bisect.bisect_right(self._starts, record.header_offset)
        if start + record.file_size > (*self._starts, self._length)[following]:
            raise CheckpointError(f"its record {record.filename} overlaps the next one")
        return start


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the archive's first byte")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._offset + self._position)
        wanted = left if size < 0 else min(size, left)
        if wanted > _MOST_BYTES:
            raise CheckpointError(f"its directory has {wanted} bytes; the limit is {_MOST_BYTES}")
        data = self._file.read(wanted)
        self._position += len(data)
        return data


@functools.lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, sizes: Shape) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the bytes of a contiguous tensor."""
    tensor = torch.empty(sizes, dtype=dtype)  # never touched, so never resident
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(tensor, cast(Any, recorder))
    return recorder.around(math.prod(sizes) * dtype.itemsize)


class _Recorder(io.RawIOBase):
    """A file that keeps what is written and where, and lets torch.save skip over the tensor's data."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset if whence == 0 else self._position + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def around(self, nbytes: int) -> tuple[bytes, bytes]:
        """The bytes before and after the one hole, which must be of ``nbytes``."""
        sides: list[list[bytes]] = [[]]
        end = 0
        for position, data in self._pieces:
            if position != end:
                sides.append([])
                end += nbytes
            if position != end:
                break
            sides[-1].append(data)
            end += len(data)
        if end != self._position or len(sides) != 1 + (nbytes > 0):
            raise RuntimeError("this version of torch.save uses an unknown file layout")
        return b"".join(sides[0]), b"".join(b"".join(side) for side in sides[1:])
