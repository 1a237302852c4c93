"""Text files in parts of bounded size: byte ranges of JSONL and plain text, row groups of parquet."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mixtral_recipes.data.records.files import PACKED, is_packed, longest_line, open_bytes, suffix_of, too_long
from mixtral_recipes.data.records.parse import read_records
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.pointers import refuse_pointer

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN_TEXT = (".txt", ".text", ".md")


@dataclass(frozen=True)
class TextPart:
    """A stretch of one file.

    Attributes:
        path: The file.
        kind: ``jsonl``, ``text``, ``parquet`` or ``csv``.
        start: First byte, or first row group.
        end: Byte, or row group, after the last; -1 is the end of the file.
        text_key: Field or column of the text.
        size: Input bytes, for progress.
    """

    path: Path
    kind: str
    start: int
    end: int
    text_key: str
    size: int


def split_into_parts(path: Path, text_key: str, part_bytes: int) -> list[TextPart]:
    """Cut a file into parts of about ``part_bytes``. Compressed and CSV files are one part.

    Raises:
        DataError: the file is missing or of a kind that is not read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    refuse_pointer(path, DataError)
    size = path.stat().st_size
    suffix = suffix_of(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        groups = _parquet(path, pq).num_row_groups
        return [TextPart(path, "parquet", g, g + 1, text_key, size // groups) for g in range(groups)]
    if suffix in (".csv", ".tsv"):
        return [TextPart(path, "csv", 0, -1, text_key, size)]
    if suffix not in (*JSON_LINES, *PLAIN_TEXT):
        known = f".jsonl, .json, .parquet, .csv, .tsv, .txt, .md, and {', '.join(PACKED)} of the text ones"
        raise DataError(f"{path}: cannot tell what this is; known: {known}.")
    kind = "jsonl" if suffix in JSON_LINES else "text"
    if is_packed(path):
        return [TextPart(path, kind, 0, -1, text_key, size)]
    starts = range(0, max(size, 1), part_bytes)
    return [TextPart(path, kind, s, min(s + part_bytes, size), text_key, min(part_bytes, size - s)) for s in starts]


def documents(part: TextPart) -> Iterator[str]:
    """The non-empty documents that begin in a part.

    Raises:
        DataError: names the file and line of a document that cannot be read.
    """
    if part.kind == "parquet":
        yield from _parquet_documents(part)
    elif part.kind == "csv":
        yield from _csv_documents(part)
    else:
        lines = _lines(part)
        yield from _json_documents(part, lines) if part.kind == "jsonl" else _text_documents(part, lines)


def _first_line(file: BinaryIO, start: int) -> int:
    """The start of the first line at or after ``start``; the file is positioned there."""
    if start:
        file.seek(start - 1)
        if file.read(1) != b"\n":
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                start += len(rest)
            return start + len(rest)
    return start


def _lines(part: TextPart) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the part, with the byte each begins at; a line belongs to the part of its first byte."""
    limit = longest_line()
    with open_bytes(part.path) as file:
        position = _first_line(file, part.start)
        while part.end < 0 or position < part.end:
            line = file.readline(limit + 1)
            if not line:
                return
            if len(line) > limit:
                raise too_long(f"{part.path}:{_line_number(part, position)}", limit)
            yield position, line
            position += len(line)


def _line_number(part: TextPart, position: int) -> int:
    """Counted only when an error is reported."""
    count, seen = 1, 0
    with open_bytes(part.path) as file:
        while seen < position:
            block = file.read(min(1 << 20, position - seen))
            count += block.count(b"\n")
            seen += len(block)
    return count


def _decode(part: TextPart, position: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{part.path}:{_line_number(part, position)}: not UTF-8 ({error.reason}).") from error


def _json_documents(part: TextPart, lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
    for position, line in lines:
        text = _decode(part, position, line)
        if not text.strip():
            continue
        try:
            value = json.loads(text)[part.text_key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{part.path}:{_line_number(part, position)}: needs a JSON object with {part.text_key!r} "
                f"({type(error).__name__}: {error}); --text-key names another field."
            ) from error
        if not isinstance(value, str):
            raise DataError(f"{part.path}:{_line_number(part, position)}: {part.text_key!r} is not text.")
        if value.strip():
            yield value


def _text_documents(part: TextPart, lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
    """Paragraphs between blank lines. A document belongs to the part in which its first line begins.

    A part may begin inside a document and end inside one: the first is skipped up to a blank line, the last
    is read to its end.
    """
    inside = part.start > 0 and not _after_blank_line(part)
    held: list[str] = []
    for position, line in lines:
        text = _decode(part, position, line)
        if text.strip():
            if not inside:
                held.append(text)
            continue
        inside = False
        if held:
            yield "".join(held).strip("\r\n")
            held = []
    if held:
        rest = TextPart(part.path, part.kind, part.end, -1, part.text_key, 0) if part.end >= 0 else None
        for position, line in _lines(rest) if rest else ():
            text = _decode(part, position, line)
            if not text.strip():
                break
            held.append(text)
        yield "".join(held).strip("\r\n")


def _after_blank_line(part: TextPart) -> bool:
    """Whether the line before the part's first one is blank."""
    with open_bytes(part.path) as file:
        first = _first_line(file, part.start)
        back = min(first, 1 << 20)
        file.seek(first - back)
        before = file.read(back)
    return not before.removesuffix(b"\n").rpartition(b"\n")[2].strip()


def _parquet(path: Path, pq: Any) -> Any:
    import pyarrow as pa

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from error


def _parquet_documents(part: TextPart) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = _parquet(part.path, pq)
    if part.text_key not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{part.path}: no column {part.text_key!r}; it has {names}. --text-key names another.")
    before = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
    for batch in file.iter_batches(row_groups=[part.start], columns=[part.text_key], batch_size=1024):
        for row, value in enumerate(batch.column(0).to_pylist(), before + 1):
            if not isinstance(value, str):
                raise DataError(f"{part.path}: row {row}: {part.text_key!r} is {type(value).__name__}, not text.")
            if value.strip():
                yield value
        before += batch.num_rows


def _csv_documents(part: TextPart) -> Iterator[str]:
    for record in read_records(part.path):
        if part.text_key not in record.value:
            names = ", ".join(record.value)
            raise DataError(f"{part.path}:1: no column {part.text_key!r}; it has {names}. --text-key names another.")
        if record.value[part.text_key].strip():
            yield record.value[part.text_key]
