"""Records of any supported file, one by one, each with its file and line."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from mixtral_recipes.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")


class Record(NamedTuple):
    """A record and its place: ``file:line``, ``file: row n`` or ``hub-id:split[n]``."""

    value: Any
    where: str


def stop(error: DataError) -> NoReturn:
    """What happens to a bad record by default."""
    raise error


BadRecord = Callable[[DataError], None]


def suffix_of(path: Path) -> str:
    """A file's ending, with a ``.gz`` looked through."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_records(path: Path, bad: BadRecord = stop) -> Iterator[Record]:
    """The records of a file.

    Args:
        path: JSONL, JSON (a list, or an object with a list ``data``), parquet, arrow, CSV or TSV; ``.gz`` of the text
            ones. All but JSON are read in bounded memory.
        bad: Called with each record that cannot be read; reading continues after it unless this raises.

    Raises:
        DataError: the file cannot be read at all.
    """
    readers = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".tsv": _csv, ".json": _json}
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot tell what this is; known: {', '.join(SUFFIXES)} (and .gz of the text ones).")
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        yield from readers.get(suffix, _jsonl)(path, bad)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, unpacked."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def parse_object(text: str, where: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        DataError: not JSON, not an object, or an object that names a field twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is a {_kind(value)}, not an object.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands there twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    return {list: "list", str: "text", type(None): "null", bool: "true or false"}.get(type(value), "number")


def _jsonl(path: Path, bad: BadRecord) -> Iterator[Record]:
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield Record(parse_object(text, where), where)
            except UnicodeDecodeError as error:
                bad(DataError(f"{where}: not UTF-8 ({error.reason}, byte {error.start + 1})."))
            except DataError as error:
                bad(error)


def _json(path: Path, bad: BadRecord) -> Iterator[Record]:
    """A list of objects, or an object that holds one under ``data``; lines of objects are recognised too."""
    with open_bytes(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}).") from error
    start = text.find("[")
    if text.lstrip()[:1] == "{":
        first_line = text.lstrip().partition("\n")[0]
        try:
            whole = "data" not in json.loads(first_line)
        except ValueError:
            whole = False
        if whole:
            yield from _jsonl(path, bad)
            return
    if start < 0:
        raise DataError(f"{path}:1: holds neither a list nor lines of objects.")
    yield from _elements(path, text, start + 1, bad)


def _elements(path: Path, text: str, position: int, bad: BadRecord) -> Iterator[Record]:
    """The elements of a JSON list, each with the line it begins on."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
    line, counted = 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            raise DataError(f"{path}:{line}: the list has no end.")
        if text[position] == "]":
            return
        where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # where the next element begins is unknown
            raise DataError(f"{where}: {getattr(error, 'msg', error)}.") from error
        if isinstance(value, dict):
            yield Record(value, where)
        else:
            bad(DataError(f"{where}: is a {_kind(value)}, not an object."))


def _parquet(path: Path, bad: BadRecord) -> Iterator[Record]:
    import pyarrow.parquet as pq

    yield from _rows(path, "parquet file", lambda: pq.ParquetFile(path).iter_batches(batch_size=1024))


def _arrow(path: Path, bad: BadRecord) -> Iterator[Record]:
    """The files `datasets.save_to_disk` writes."""
    import pyarrow as pa

    yield from _rows(path, "arrow stream", lambda: pa.ipc.open_stream(pa.memory_map(str(path))))


def _rows(path: Path, kind: str, batches: Callable[[], Iterable[Any]]) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches():
            for value in batch.to_pylist():
                number += 1
                yield Record(value, f"{path}: row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable {kind} ({error}).") from error


def _csv(path: Path, bad: BadRecord) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                bad(DataError(f"{where}: not a CSV row ({error})."))
                continue
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: not UTF-8 at this line or within the next 8 KiB ({error.reason})."
                ) from error
            if row is None:
                return
            if names is None:
                names = row
            elif len(row) == len(names):
                yield Record(dict(zip(names, row, strict=True)), where)
            elif row:
                bad(DataError(f"{where}: has {len(row)} columns, and the head {len(names)}."))
