"""Records of any supported file, one by one, each with its file and line."""

import contextlib
import csv
import io
import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.files import PACKED, longest_line, open_bytes, suffix_of, too_long
from mixtral_recipes.data.records.json_stream import json_records, object_of, parse_json
from mixtral_recipes.data.records.record import Record, may_hold
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.files import lines_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
_ROWS_AT_ONCE = 64  # a row may be a whole conversation
_MAPPED_AT_ONCE = 4 << 20  # bytes of a mapped file that count as this process's memory


def read_records(path: Path, bad: BadRecord = stop, split: str | None = None) -> Iterator[Record]:
    """The records of a file, in bounded memory.

    Args:
        path: JSONL, JSON in any arrangement, parquet, arrow, CSV or TSV; the text ones also packed.
        bad: Called with each record that cannot be read; reading continues after it unless this raises.
        split: The split's own name in a JSON file that holds several.

    Raises:
        DataError: the file cannot be read at all.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        known = f"{', '.join(SUFFIXES)} (and, for text files, {', '.join(PACKED)})"
        raise DataError(f"{path}: unknown file type; supported are {known}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    tables = {".parquet": parquet_records, ".arrow": _arrow}
    try:
        if suffix in tables:
            yield from tables[suffix](path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path, bad)
        elif suffix == ".json" or not is_json_lines(path):
            yield from json_records(path, bad, split)
        else:
            yield from _jsonl(path, bad)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        DataError: not JSON, not an object, or an object that names a field twice.
    """
    return object_of(parse_json(text, where), where)


def is_json_lines(path: Path) -> bool:
    """Whether a JSON file has an object in each line: its first line is no list and more than the start of an object.

    One of another kind has no lines of JSON.
    """
    if suffix_of(path) not in (".jsonl", ".ndjson", ".json"):
        return False
    with open_bytes(path) as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    first = start.partition(b"\n")[0].strip()
    if suffix_of(path) != ".json":
        return not start.startswith(b"[") and first != b"{"
    try:  # .json may hold one object, in lists of which the records are
        return len(start) > len(first) + 1 and not any(map(may_hold, dict(json.loads(first))))
    except (ValueError, TypeError, RecursionError):
        return False


def _jsonl(path: Path, bad: BadRecord) -> Iterator[Record]:
    limit = longest_line()
    with open_bytes(path) as file:
        for number, line in enumerate(lines_of(file, limit), 1):
            where = f"{path}:{number}"
            text = ""
            if line is None:
                bad(too_long(where, limit))
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield Record(parse_object(text, where), where, text)
            except UnicodeDecodeError as error:
                bad(
                    DataError(f"{where}: not UTF-8 ({error.reason}, byte {error.start + 1})."),
                    line.decode("utf-8", "replace"),
                )
            except DataError as error:
                bad(error, text)


def parquet_records(path: Path, group: int | None = None, column: str | None = None) -> Iterator[Record]:
    """The rows of a parquet file.

    Args:
        path: The file.
        group: Which of its row groups; None takes all.
        column: Which of its columns; None takes all.

    Raises:
        DataError: it cannot be read, or has no such column.
    """
    with _readable(path, "parquet file"), _open_parquet(path) as file:
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise DataError(
                f"{path}: no column {column!r}; it has {', '.join(names)}; set data.text_key (--text-key) to one of "
                "them."
            )
        wanted = {"row_groups": None if group is None else [group], "columns": None if column is None else [column]}
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False, **wanted)
        yield from _rows(path, batches, sum(file.metadata.row_group(before).num_rows for before in range(group or 0)))


def row_groups(path: Path) -> int:
    """How many row groups a parquet file has.

    Raises:
        DataError: it is none.
    """
    with _readable(path, "parquet file"), _open_parquet(path) as file:
        return file.num_row_groups


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # mimalloc keeps 20 MB of what a few rows once needed
    # Buffered: a row group, which may be the whole file, is not read at once.
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _arrow(path: Path) -> Iterator[Record]:
    """The streams `datasets.save_to_disk` writes, and arrow's own files."""
    with _readable(path, "arrow file"):
        yield from _rows(path, _arrow_slices(path))


def _arrow_slices(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        # A batch, which may be the whole file, is not copied; nor does what was read stay in this process.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    behind = 0
    for batch in _arrow_batches(pa, pa.BufferReader(pa.py_buffer(mapped))):
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            some = batch.slice(start, _ROWS_AT_ONCE)
            yield some
            behind += some.nbytes
            if behind > _MAPPED_AT_ONCE:
                mapped.madvise(mmap.MADV_DONTNEED)
                behind = 0


def _arrow_batches(pa: Any, whole: Any) -> Iterator[Any]:
    if whole.read(6) == b"ARROW1":
        file = pa.ipc.open_file(whole)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        whole.seek(0)
        yield from pa.ipc.open_stream(whole)


def _rows(path: Path, batches: Iterable[Any], before: int = 0) -> Iterator[Record]:
    """The rows of a table's batches, of which so many others stand before."""
    number = before
    for batch in batches:
        if number == before:
            _refuse_twice(path, batch.schema.names)
        for value in batch.to_pylist(maps_as_pydicts="lossy"):
            number += 1
            yield Record(value, f"{path}: row {number}")


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """What arrow raises of a damaged file; of text that is no UTF-8, and of a time before all years, too."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable {kind} ({error}).") from error


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the column {twice!r} appears twice; rename one of them.")


def _csv(path: Path, bad: BadRecord) -> Iterator[Record]:
    csv.field_size_limit(longest_line())
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        names: list[str] | None = None
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error):  # a quote's: no record behind it is known
                    raise DataError(f"{where}: a quotation mark opens in this row and is never closed.") from error
                bad(DataError(f"{where}: not a CSV row{_through(line, reader.line_num)} ({error})."))
                continue
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: not UTF-8 at this line or within the next 8 KiB ({error.reason})."
                ) from error
            if row is None:
                return
            if names is None:
                names = row
                _refuse_twice(path, names)
            elif len(row) == len(names):
                yield Record(dict(zip(names, row, strict=True)), where)
            elif row:
                through = _through(line, reader.line_num)
                bad(DataError(f"{where}: has {len(row)} columns{through}, but the header has {len(names)}."), row)


def _through(first: int, last: int) -> str:
    return f" (the row goes on to line {last})" if last > first else ""
