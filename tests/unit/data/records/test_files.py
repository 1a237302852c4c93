"""One way to open a file: packed however it is, marked or not."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mixtral_recipes.data import recognize
from mixtral_recipes.data.records.bad_records import Skipped
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.parse import read_records
from mixtral_recipes.data.records.text_parts import documents, split_into_parts
from mixtral_recipes.errors import DataError

ROWS = [{"input": f"q{n}", "output": f"a{n}", "text": f"Document {n}."} for n in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
SQUAD = json.dumps(
    {
        "data": [
            {
                "paragraphs": [
                    {"context": f"c {n}", "qas": [{"id": f"{n}", "question": "q", "answers": [{"text": "c"}]}]}
                    for n in range(4)
                ]
            }
        ]
    }
)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKERS)
def test_every_reader_unpacks(tmp_path: Path, packed: str) -> None:
    def write(name: str, text: str) -> Path:
        path = tmp_path / (name + packed)
        path.write_bytes(PACKERS[packed](text.encode()))
        return path

    table = "input,output,text\n" + "".join(f"{r['input']},{r['output']},{r['text']}\n" for r in ROWS)
    for path in (write("a.jsonl", LINES), write("b.json", json.dumps(ROWS)), write("c.csv", table)):
        assert [record.value for record in read_records(path)] == ROWS, path.name
        assert recognize(path).kind == "pairs"
    assert recognize(write("squad.json", SQUAD)).kind == "squad"
    for path in (write("t.jsonl", LINES), write("t.txt", "\n\n".join(r["text"] for r in ROWS))):
        (part,) = split_into_parts(path, "text", 64)
        assert list(documents(part)) == [r["text"] for r in ROWS]


def test_what_is_packed_is_told_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert len(list(read_records(path))) == 20
    assert suffix_of(Path("x.JSON.GZ")) == ".json"


@pytest.mark.parametrize("packed", PACKERS)
def test_a_broken_packing_is_said(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACKERS[packed](LINES.encode())[:-12])
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        list(read_records(path))


@pytest.mark.parametrize("packed", PACKERS)
def test_all_parts_of_a_packed_file_are_read_or_refused(tmp_path: Path, packed: str) -> None:
    """Packers write files in parts where several work on them, and files are joined with `cat`."""
    path = tmp_path / f"a.jsonl{packed}"
    many = 5000 * LINES  # more than a block of what is read at a time
    one, two = PACKERS[packed](LINES.encode()), PACKERS[packed](many.encode())
    padding = {".xz": bytes(4), ".gz": bytes(7)}.get(packed, b"")
    path.write_bytes(one + padding + two + one)
    assert sum(1 for _ in read_records(path)) == 5002 * len(ROWS)
    for broken in (b"x" + two, two[:2] + b"x" + two[3:], two[: len(two) // 2], b"more"):
        path.write_bytes(one + broken)
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            list(read_records(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    data = LINES.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    named = "UTF-32" if encoding == "utf-32" else "UTF-16"
    read = (lambda: documents(split_into_parts(path, "text", 64)[0])) if name == "a.txt" else lambda: read_records(path)
    with pytest.raises(DataError, match=rf"{path}: is {named}, but must be UTF-8; convert it with `iconv -f {named}"):
        list(read())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    text = "input\nq\n" if name == "a.csv" else '{"input": "q"}\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [record.value for record in read_records(tmp_path / name)] == [{"input": "q"}]


def test_a_jsonl_that_is_no_lines_is_read_as_json(tmp_path: Path) -> None:
    for text in (json.dumps(ROWS), "\n".join(json.dumps(row, indent=2) for row in ROWS)):
        (tmp_path / "a.jsonl").write_text(text)
        assert [record.value for record in read_records(tmp_path / "a.jsonl")] == ROWS


def test_nested_structs_of_parquet_and_arrow(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}], "extra": {"n": n}}
        for n in range(200)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=150)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=90)
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        found = list(read_records(tmp_path / name))
        assert [record.value for record in found] == rows
        assert found[150].where == f"{tmp_path / name}: row 151"
        assert recognize(tmp_path / name).kind == "chat"


def test_a_line_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed, a thousandth of its size on disk; the lines around it are read."""
    monkeypatch.setenv("MIXTRAL_RECIPES_LONGEST_LINE", "1000")
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"a": "b"}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": "c"}\n')
    skipped = Skipped()
    assert [record.value for record in read_records(path, skipped)] == [{"a": "b"}, {"a": "c"}]
    assert "x.jsonl.gz:2: a line of more than 1,000 bytes; set MIXTRAL_RECIPES_LONGEST_LINE" in skipped.first
    parts = split_into_parts(path, "a", 1000)
    with pytest.raises(DataError, match=r":2: a line of more than 1,000 bytes"):
        [text for part in parts for text in documents(part)]
    plain = tmp_path / "x.jsonl"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    for parts in (split_into_parts(path, "a", 1000), split_into_parts(plain, "a", 1000)):
        skipped = Skipped()
        assert [text for part in parts for text in documents(part, skipped)] == ["b", "c"]
        assert (skipped.count, ":2: a line of more than 1,000 bytes" in skipped.first) == (1, True)
    monkeypatch.setenv("MIXTRAL_RECIPES_LONGEST_LINE", "many")
    with pytest.raises(DataError, match="'many' must be a number of bytes"):
        list(read_records(path))
