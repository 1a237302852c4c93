"""The one way a data file is opened: unpacked by what it is, and read as UTF-8 with or without a mark."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mixtral_recipes.errors import DataError

PACKED = (".gz", ".zst", ".bz2", ".xz")
_SNIFFED = 512
_PACKED = 1 << 16
LIMIT = "MIXTRAL_RECIPES_LONGEST_LINE"
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def longest_line() -> int:
    """Bytes that a line, or a JSON value, may have: ``$MIXTRAL_RECIPES_LONGEST_LINE``, by default 256 MiB.

    A file that is not what its name says, or one that unpacks to a million times its size, would otherwise be read into
    memory as a whole.

    Raises:
        DataError: the variable is no number of bytes.
    """
    said = os.environ.get(LIMIT) or str(1 << 28)
    if not said.isascii() or not said.isdigit() or not 0 < int(said) < 1 << 40:
        raise DataError(f"{LIMIT}={said!r} must be a number of bytes.")
    return int(said)


def too_long(where: object, limit: int) -> DataError:
    """An error about a line that is longer."""
    return DataError(f"{where}: a line of more than {limit:,} bytes; set {LIMIT} to a higher number if it is a record.")


def suffix_of(path: Path) -> str:
    """A file's ending, with ``.gz``, ``.zst``, ``.bz2`` and ``.xz`` looked through."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the file is compressed, by its first bytes."""
    with path.open("rb") as file:
        return _packer(file.read(6)) is not None


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, unpacked: gzip, Zstandard, bzip2 and xz are told by their first bytes, whatever the name.

    Raises:
        DataError: the text is UTF-16 or UTF-32. Reading raises it where the packing is broken.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        packer = _packer(file.read(6))
    stream = io.BufferedReader(_Unpacked(path, packer) if packer else path.open("rb", buffering=0), 1 << 20)
    encoding = _other_encoding(stream.peek(_SNIFFED)[:_SNIFFED])
    if encoding:
        stream.close()
        raise DataError(
            f"{path}: is {encoding}, but must be UTF-8; convert it with `iconv -f {encoding} -t UTF-8 {path.name}`."
        )
    return stream


def _packer(start: bytes) -> str | None:
    magic = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
    return next((name for first, name in magic.items() if start.startswith(first)), None)


class _Unpacked(io.RawIOBase):
    """What a packed file holds; each library tells of broken packing in its own way, and this in one."""

    def __init__(self, path: Path, packer: str) -> None:
        self._path = path
        self._stream = _unpacking(path, packer)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As Python's."""
        try:
            content = self._stream.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{self._path}: cannot be read ({error}).") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the file too."""
        self._stream.close()
        super().close()


def _unpacking(path: Path, packer: str) -> Any:
    if packer == "zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    if packer == "gz":
        return gzip.open(path)
    return _Streams(path, {"bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}[packer])


class _Streams:
    """The streams of a bz2 or xz file, one after another, to its end.

    Python's own readers stop silently at a second stream whose beginning is damaged.
    """

    def __init__(self, path: Path, unpacker: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file = path.open("rb")
        self._new = unpacker
        self._unpacker = unpacker()

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        content = b""
        while not content:
            packed = b""
            if self._unpacker.eof:
                packed = self._unpacker.unused_data.lstrip(b"\0") or self._after_zeros()
                if not packed:
                    break
                self._unpacker = self._new()
            elif self._unpacker.needs_input:
                packed = self._file.read(_PACKED)
                if not packed:
                    raise EOFError("it ends in the middle of the compressed data")
            content = self._unpacker.decompress(packed, size)
        return content

    def _after_zeros(self) -> bytes:
        while packed := self._file.read(_PACKED):
            if packed := packed.lstrip(b"\0"):  # xz may pad its streams
                break
        return packed

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _other_encoding(start: bytes) -> str | None:
    """UTF-16 and UTF-32 by their mark, or, without one, by the zeros between Latin letters."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    pairs = start[: len(start) // 2 * 2]
    if len(pairs) >= 4 and (not any(pairs[1::2]) or not any(pairs[::2])):
        return "UTF-16"
    return None
