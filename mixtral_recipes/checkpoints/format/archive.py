"""The archive ``torch.save`` makes of one tensor: what surrounds the numbers, and where they are.

An item of a ``.distcp`` file is such an archive: a zip in which nothing is compressed, of a pickle that describes the
tensor, a record of its bytes, and a few short ones. The writer needs the frame around the bytes, the reader the place
of the bytes; neither needs torch to load or save anything.
"""

import functools
import io
import math
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch

from mixtral_recipes.checkpoints.format.restricted_pickle import described_tensor
from mixtral_recipes.checkpoints.format.shard import Shape
from mixtral_recipes.errors import CheckpointError

_MOST_PICKLE_BYTES = 1 << 16  # a tensor's description takes 150
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
    window = _Window(file, offset, length)
    try:
        with zipfile.ZipFile(cast(Any, window)) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            content = archive.read(_plain(records, "data.pkl", _MOST_PICKLE_BYTES))
            tensor = described_tensor(content)
            if "byteorder" in records and archive.read(_plain(records, "byteorder", 16)) != b"little":
                raise CheckpointError("its bytes are in big-endian order")
            data = _plain(records, f"data/{tensor.record}", length)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    window.seek(data.header_offset)
    header = window.read(_LOCAL_HEADER)
    start = data.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start += tensor.offset * tensor.dtype.itemsize
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    if header[:4] != b"PK\3\4" or tensor.offset * tensor.dtype.itemsize + nbytes > data.file_size:
        raise CheckpointError("its description and its bytes do not fit")
    if start + nbytes > length:
        raise CheckpointError("it reaches beyond its end")
    return StoredTensor(tensor.dtype, tensor.shape, start)


def _plain(records: dict[str, zipfile.ZipInfo], name: str, most: int) -> zipfile.ZipInfo:
    """A record that lies in the archive as it is."""
    record = records.get(name)
    if record is None:
        raise CheckpointError(f"it has no record {name}")
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise CheckpointError(f"its record {record.filename} is compressed or encrypted")
    if record.file_size != record.compress_size or record.file_size > most:
        raise CheckpointError(f"its record {record.filename} cannot have {record.file_size} bytes")
    return record


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
        data = self._file.read(left if size < 0 else min(size, left))
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
            raise RuntimeError("torch.save lays its file out in another way than the one known here")
        return b"".join(sides[0]), b"".join(b"".join(side) for side in sides[1:])
