"""Text files in parts: byte ranges of JSON lines and of plain text, row groups of parquet, any other file whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.files import PACKED, is_packed, longest_line, open_bytes, suffix_of, too_long
from mixtral_recipes.data.records.json_stream import json_splits, parse_json
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.parse import SUFFIXES, is_json_lines, read_records
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
        raise DataError(f"{path}: {'a folder; name the files in it' if path.is_dir() else 'no such file'}.")
    refuse_pointer(path, DataError)
    size = path.stat().st_size
    suffix = suffix_of(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        groups = _parquet(path, pq).num_row_groups
        return [TextPart(path, "parquet", g, g + 1, text_key, size // groups) for g in range(groups)]
    if suffix not in TEXT_SUFFIXES:
        known = f"{', '.join(TEXT_SUFFIXES)}, and {', '.join(PACKED)} of the text ones"
        raise DataError(f"{path}: cannot tell what this is; known: {known}.")
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
        bad: Called with each record that has no text, or cannot be read; reading goes on after it unless this raises.

    Raises:
        DataError: names the file and line of a document that cannot be read.
    """
    if part.kind == "parquet":
        yield from _parquet_documents(part, bad)
    elif part.kind == "records":
        for record in read_records(part.path, bad, part.split):
            yield from _text_in(record.value, part, lambda record=record: record.where, bad)
    elif part.kind == "jsonl":
        yield from _json_documents(part, bad)
    else:
        yield from _text_documents(part, _lines(part))


def _text_in(value: Any, part: TextPart, where: Callable[[], str], bad: BadRecord) -> Iterator[str]:
    """The text of a record, where it has one."""
    text = value.get(part.text_key) if isinstance(value, dict) else None
    if isinstance(text, str):
        try:
            yield text_of(text, part.text_key, "", empty=True) if text.strip() else ""
        except DataError as error:
            bad(DataError(f"{where()}{error}"), value)
        return
    if not isinstance(value, dict):
        what = "needs a JSON object"
    elif part.text_key not in value:
        names = ", ".join(map(str, value)) or "nothing"
        what = f"has no {part.text_key!r}, but {names}; data.text_key (--text-key) names another"
    else:
        what = f"{part.text_key!r} is {'null' if text is None else type(text).__name__}, not text"
    bad(DataError(f"{where()}: {what}."), value)


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
                raise too_long(_place(part, position), limit)
            yield position, line
            position += len(line)


def _place(part: TextPart, position: int) -> str:
    """The file and the line, which is counted only when an error is reported."""
    count, seen = 1, 0
    with open_bytes(part.path) as file:
        while seen < position:
            block = file.read(min(1 << 20, position - seen))
            count += block.count(b"\n")
            seen += len(block)
    return f"{part.path}:{count}"


def _decode(part: TextPart, position: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{_place(part, position)}: not UTF-8 ({error.reason}).") from error


def _json_documents(part: TextPart, bad: BadRecord) -> Iterator[str]:
    for position, line in _lines(part):
        try:
            text = _decode(part, position, line).strip()
        except DataError as error:
            bad(error, line.decode("utf-8", "replace"))
            continue
        if not text:
            continue
        try:
            value = parse_json(text, "")
        except DataError as error:  # its place takes reading what is before it
            bad(DataError(f"{_place(part, position)}{error}"), text)
            continue
        yield from _text_in(value, part, lambda position=position: _place(part, position), bad)


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
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from error


def _parquet_documents(part: TextPart, bad: BadRecord) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = _parquet(part.path, pq)
    if part.text_key not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(
            f"{part.path}: no column {part.text_key!r}; it has {names}; data.text_key (--text-key) names another."
        )
    row = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
    # A row group, which may be the whole file, is not read at once.
    batches = file.iter_batches(row_groups=[part.start], columns=[part.text_key], batch_size=64, use_threads=False)
    for batch in batches:
        for text in batch.column(0).to_pylist():
            row += 1
            yield from _text_in({part.text_key: text}, part, lambda row=row: f"{part.path}: row {row}", bad)
