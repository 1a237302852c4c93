"""JSON in every arrangement people bring, streamed, with the line of each record and of each fault."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_recipes.data.records import json_stream
from mixtral_recipes.data.records.bad_records import Skipped
from mixtral_recipes.data.records.json_stream import json_records, json_splits
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.errors import DataError

ROWS = [{"input": f"q{n}", "output": f"a{n}"} for n in range(20)]


def pretty(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


ARRANGEMENTS = {
    "list": json.dumps(ROWS),
    "pretty list": json.dumps(ROWS, indent=1),
    "data": json.dumps({"version": 1, "data": ROWS}),
    "data behind another list": json.dumps({"tags": ["x", "y"], "data": ROWS, "licence": "x"}, indent=1),
    "records": json.dumps({"records": ROWS}),
    "lines": "\n".join(map(json.dumps, ROWS)) + "\n",
    "pretty objects": pretty(ROWS),
    "objects on one line": "".join(map(json.dumps, ROWS)),
    "two lists": json.dumps(ROWS[:7]) + "\n" + json.dumps(ROWS[7:]),
    "two objects with lists": json.dumps({"data": ROWS[:7]}) + json.dumps({"data": ROWS[7:]}),
    "marked": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_every_record_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text(ARRANGEMENTS[name])
    assert [record.value for record in json_records(path)] == ROWS
    assert json_splits(path) == []


def test_splits_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"about": "x", "train": ROWS[:15], "val": ROWS[15:]}, indent=1))
    source = open_source(path)
    assert source.splits == ["train", "validation"]
    assert [record.value for record in source.records("train")] == ROWS[:15]
    assert [record.value for record in source.records("validation")] == ROWS[15:]
    path.write_text(json.dumps({"test": ROWS}))
    assert [record.value for record in open_source(path).records("test")] == ROWS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ":1: is empty"),
        ("\n5", ":2: begins with '5'"),
        ("[{}]\n\nmore", ":3: 'm' follows the end of the list"),
        ('{"a": 1}\n[{}]', ":2: '\\[' follows the end of the object"),
        ('[{"a": 1},\n{"a": }]', ":2: not JSON \\(Expecting value\\)"),
        ('[{"a": 1}\n{"a": 2}]', ":2: not JSON \\(',' is missing"),
        ('[\n{"a": 1}', ":2: the list is not closed"),
        ('[\n{"a": 1},', ":2: the list is not closed"),
        ('[\n{"a": "1}]', ":2: not JSON \\(Unterminated string"),
        ('{"data": [{"a": 1}],\n"rows": [{"a": 1}]}', ":2: several lists of objects \\('data', 'rows'\\)"),
        ('{"data": [{"a": 1}], "more": [{"a": 1}]}', ":1: 'more' is a list of objects, and so is 'data'"),
        (
            '{"input": "q", "output": "a",\n"examples": [{"input": "b", "output": "c"}]}',
            ":1: is a record, but also has a list of records",
        ),
        ('[{"a": 1},\n\n7]', ":3: is a number, not an object"),
        ('{"a": 1, "a": 2}', ":1: field 'a' appears twice"),
        ('[{"a": NaN}]', ":1: NaN is not JSON"),
        ("[" + '{"a":' * 100_000, ":1: nested too deeply"),
        ('{"a": 1}\n{"a" 2}', ":2: not JSON"),
    ],
)
def test_faults_name_their_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{path}{says}"):
        list(json_records(path))


def test_a_broken_object_among_objects_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(pretty(ROWS[:3]) + '\n{\n  "input": oops\n}\n' + pretty(ROWS[3:]))
    skipped = Skipped()
    assert [record.value for record in json_records(path, skipped)] == ROWS
    assert skipped.count == 1
    assert skipped.first.startswith(f"{path}:14: not JSON")


def test_a_value_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_LONGEST_LINE", str(1 << 21))
    path = tmp_path / "x.json"
    path.write_text('[{"a": "' + "x" * (1 << 22))
    with pytest.raises(DataError, match="does not end within 2,097,152 characters"):
        list(json_records(path))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
rows_of = st.dictionaries(st.sampled_from(["a", "b", "text", "x y"]), values, min_size=1)
lists_of_rows = st.lists(rows_of, min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=lists_of_rows, block=st.integers(1, 40), indent=st.sampled_from([None, 1]), kind=st.sampled_from("lodp"))
def test_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], block: int, indent: int | None, kind: str
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    whole = {"l": rows, "d": {"n": 1, "data": rows}, "p": {"train": rows}}
    text = (
        "\n".join(json.dumps(row, indent=indent) for row in rows)
        if kind == "o"
        else json.dumps(whole[kind], indent=indent, ensure_ascii=False)
    )
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    found = list(json_records(path))
    assert [record.value for record in found] == rows
    for record in found:  # the line is the one the record begins on
        line = text.split("\n")[int(record.where.rpartition(":")[2]) - 1]
        assert "{" in line
