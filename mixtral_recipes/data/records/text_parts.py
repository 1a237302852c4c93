"""Text files in parts: byte ranges of JSON lines and of plain text, row groups of parquet, any other file whole."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.files import PACKED, is_packed, longest_line, open_bytes, suffix_of, too_long
from mixtral_recipes.data.records.json_stream import json_splits, parse_json
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.parse import SUFFIXES, is_json_lines, parquet_records, read_records, row_groups
from mixtral_recipes.data.records.record import SPLIT_NAMES
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.pointers import refuse_pointer

PLAIN_TEXT = (".txt", ".text", ".md")
TEXT_SUFFIXES = (*SUFFIXES, *PLAIN_TEXT)


@dataclass(frozen=True)
class TextPart:
    """A stretch of one file.

    Attributes:
        path: The file.
        kind: ``jsonl``, ``text``, ``parquet`` or ``records`` (of any file `read_records` takes).
        start: First byte, or first row group.
        end: Byte, or row group, after the last; -1 is the end of the file.
        text_key: Field or column of the text.
        size: Input bytes, for progress.
        split: The split's own name, in a JSON file that holds several.
    """

    path: Path
    kind: str
    start: int
    end: int
    text_key: str
    size: int
    split: str | None = None


def split_into_parts(path: Path, text_key: str, part_bytes: int, split: str = "train") -> list[TextPart]:
    """Cut a file into parts of about ``part_bytes``. What is compressed, a table, or JSON in no lines is one part.

    Args:
        path: The file.
        text_key: Field or column of the text.
        part_bytes: Bytes per part.
        split: Which split of a JSON file that holds several.

    Raises:
        DataError: the file is missing or of a kind that is not read.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'this is a folder; pass the files in it' if path.is_dir() else 'no such file'}.")
    refuse_pointer(path, DataError)
    size = path.stat().st_size
    suffix = suffix_of(path)
    if suffix == ".parquet":
        groups = row_groups(path)
        return [TextPart(path, "parquet", g, g + 1, text_key, size // groups) for g in range(groups)]
    if suffix not in TEXT_SUFFIXES:
        known = f"{', '.join(TEXT_SUFFIXES)} (and, for text files, {', '.join(PACKED)})"
        raise DataError(f"{path}: unknown file type; supported are {known}.")
    if suffix in SUFFIXES and not is_json_lines(path):
        inside = {SPLIT_NAMES[name.lower()]: name for name in json_splits(path)} if suffix == ".json" else {}
        return [TextPart(path, "records", 0, -1, text_key, size, inside.get(split))]
    kind = "text" if suffix in PLAIN_TEXT else "jsonl"
    if is_packed(path):
        return [TextPart(path, kind, 0, -1, text_key, size)]
    starts = range(0, max(size, 1), part_bytes)
    return [TextPart(path, kind, s, min(s + part_bytes, size), text_key, min(part_bytes, size - s)) for s in starts]


def documents(part: TextPart, bad: BadRecord = stop) -> Iterator[str]:
    """The documents that begin in a part; an empty text is one, for the caller to count.

    Args:
        part: The part.
        bad: Called with each record that has no text or cannot be read; reading continues unless this raises.

    Raises:
        DataError: names the file and line of a document that cannot be read.
    """
    if part.kind == "text":
        yield from _text_documents(part, bad)
        return
    for value, where in _records(part, bad):
        yield from _text_in(value, part, where, bad)


def _records(part: TextPart, bad: BadRecord) -> Iterator[tuple[Any, object]]:
    """The records of a part with their places."""
    if part.kind == "jsonl":
        yield from _json_lines(part, bad)
    elif part.kind == "parquet":
        yield from (record[:2] for record in parquet_records(part.path, part.start, part.text_key))
    else:
        yield from (record[:2] for record in read_records(part.path, bad, part.split))


def _text_in(value: Any, part: TextPart, where: object, bad: BadRecord) -> Iterator[str]:
    """The text of a record, where it has one."""
    text = value.get(part.text_key) if isinstance(value, dict) else None
    if isinstance(text, str):
        try:
            yield text_of(text, part.text_key, where, empty=True) if text.strip() else ""
        except DataError as error:
            bad(error, value)
        return
    if not isinstance(value, dict):
        what = "needs a JSON object"
    elif part.text_key not in value:
        names = ", ".join(map(str, value)) or "nothing"
        what = f"has no {part.text_key!r}, but {names}; set data.text_key (--text-key) to one of them"
    else:
        what = f"{part.text_key!r} is {'null' if text is None else type(text).__name__}, not text"
    bad(DataError(f"{where}: {what}."), value)


def _first_line(file: BinaryIO, start: int) -> int:
    """The start of the first line at or after ``start``; the file is positioned there."""
    if start:
        file.seek(start - 1)
        if file.read(1) != b"\n":
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                start += len(rest)
            return start + len(rest)
    return start


class _Place(NamedTuple):
    """A file and a byte of it, told as the line, which is counted only when an error is reported."""

    path: Path
    position: int

    def __str__(self) -> str:
        count, seen = 1, 0
        with open_bytes(self.path) as file:
            while seen < self.position:
                block = file.read(min(1 << 20, self.position - seen))
                count += block.count(b"\n")
                seen += len(block)
        return f"{self.path}:{count}"


def _lines(part: TextPart) -> Iterator[tuple[_Place, bytes | None]]:
    """Lines that begin in the part, with their places; None for one that is too long.

    A line belongs to the part of its first byte.
    """
    limit = longest_line()
    with open_bytes(part.path) as file:
        position = _first_line(file, part.start)
        while part.end < 0 or position < part.end:
            line = file.readline(limit + 1)
            if not line:
                return
            where = _Place(part.path, position)
            position += len(line)
            if len(line) <= limit:
                yield where, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
                position += len(line)
            yield where, None


def _decode(where: _Place, line: bytes | None) -> str:
    if line is None:
        raise too_long(where, longest_line())
    try:
        return line.decode("utf-8-sig" if where.position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}).") from error


def _json_lines(part: TextPart, bad: BadRecord) -> Iterator[tuple[Any, object]]:
    for where, line in _lines(part):
        try:
            text = _decode(where, line).strip()
            if text:
                yield parse_json(text, where), where
        except DataError as error:
            bad(error, line and line.decode("utf-8", "replace").strip())


def _text_documents(part: TextPart, bad: BadRecord) -> Iterator[str]:
    """Paragraphs between blank lines. A document belongs to the part in which its first line begins.

    A part may begin inside a document and end inside one: the first is skipped up to a blank line, the last
    is read to its end.
    """
    inside = part.start > 0 and not _after_blank_line(part)
    held: list[tuple[_Place, bytes | None]] = []
    for where, line in _lines(part):
        if _is_blank(line):
            yield from _document(held, bad)
            inside, held = False, []
        elif not inside:
            held.append((where, line))
    if held and part.end >= 0:
        rest = TextPart(part.path, part.kind, part.end, -1, part.text_key, 0)
        held += itertools.takewhile(lambda placed: not _is_blank(placed[1]), _lines(rest))
    yield from _document(held, bad)


def _document(lines: list[tuple[_Place, bytes | None]], bad: BadRecord) -> Iterator[str]:
    """The document of some lines, if there are any; it is a bad record whole if one of them is."""
    try:
        if lines:
            yield "".join(_decode(where, line) for where, line in lines).strip("\r\n")
    except DataError as error:
        bad(error, "".join(line.decode("utf-8", "replace") for _, line in lines if line).strip())


def _is_blank(line: bytes | None) -> bool:
    """Whether a line is of white space only, such as an ideographic space, or the mark at the start of a file."""
    return line is not None and not line.decode("utf-8-sig", "replace").strip()


def _after_blank_line(part: TextPart) -> bool:
    """Whether the line before the part's first one is blank."""
    with open_bytes(part.path) as file:
        first = _first_line(file, part.start)
        back = min(first, 1 << 20)
        file.seek(first - back)
        before = file.read(back)
    return _is_blank(before.removesuffix(b"\n").rpartition(b"\n")[2])
