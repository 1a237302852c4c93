"""Text to indexed corpora: the same bytes however it is cut, stopped or spread, and errors with their line."""

import concurrent.futures
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_recipes.data import corpus
from mixtral_recipes.data.corpus import Encoder, prepare_corpus
from mixtral_recipes.data.records.text_parts import TextPart, documents, split_into_parts
from mixtral_recipes.errors import DataError

TEXTS = [f"Document {n} has {'many ' * (n % 7)}words.\nA <s>second</s> line." for n in range(300)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def both_files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_megatron_reads_what_was_written(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    made = prepare_corpus([source], tmp_path / "c", Encoder.of(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about Transformer Engine and ranks
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        read = IndexedDataset(str(made.prefix))
    assert (made.documents, made.tokens) == (len(TEXTS), int(read.sequence_lengths.sum()))
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
        assert read[number].tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert read.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert read.index.dtype == np.uint16


@pytest.mark.parametrize(("part_bytes", "workers"), [(1 << 20, 1), (1000, 1), (97, 1), (5000, 2)])
def test_cuts_and_processes_change_nothing(
    source: Path, tmp_path: Path, tokenizer: Any, part_bytes: int, workers: int
) -> None:
    prepare_corpus([source], tmp_path / "whole", Encoder.of(tokenizer))
    prepare_corpus([source], tmp_path / "cut", Encoder.of(tokenizer), part_bytes=part_bytes, num_workers=workers)
    assert both_files(tmp_path / "whole") == both_files(tmp_path / "cut")


@settings(max_examples=100, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(["a", "bb b", "c\nd", "", " ", "\n", "é" * 5]), max_size=12),
    part_bytes=st.integers(1, 30),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_text_documents_survive_any_cut(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str], part_bytes: int, newline: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("\n\n".join(blocks).replace("\n", newline).encode())
    whole = list(documents(TextPart(path, "text", 0, -1, "text", 0)))
    parts = split_into_parts(path, "text", part_bytes)
    assert [text for part in parts for text in documents(part)] == whole


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text.replace("\n", " ") for text in TEXTS[:20]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=7)
    with pa.ipc.new_stream(tmp_path / "f.arrow", pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": texts}))
    with (tmp_path / "e.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    for path in sorted(tmp_path.iterdir()):
        parts = split_into_parts(path, "text", 100)
        assert [text for part in parts for text in documents(part)] == texts, path.name


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["w" * 5000] * 3}), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:4000] + b"\xff" + content[4001:])
    parts = split_into_parts(path, "text", 100)
    with pytest.raises(DataError, match=r"d\.parquet: not a readable parquet file \('utf-8'"):
        list(documents(parts[0]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"body": "x"}', "has no 'text', but body; set data.text_key (--text-key) to one"),
        (b'{"text": 5}', "'text' is int, not text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["text"]', "needs a JSON object"),
        (rb'{"text": "a \ud800"}', r"'text' contains half of a UTF-16 pair (\ud800)"),
        (b'{"text": "a", "text": "b"}', "field 'text' appears twice"),
        (b'{"text": "a", "score": NaN}', "NaN is not JSON"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: bytes, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 41 + line + b"\n" + good * 9)
    with pytest.raises(DataError) as caught:
        prepare_corpus([path], tmp_path / "c", Encoder.of(tokenizer), part_bytes=100)
    assert str(caught.value).startswith(f"{path}:42: ")
    assert says in str(caught.value)
    assert not (tmp_path / "c.idx").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,text\n1,good\n2,one,too many\n", r":3: has 3 columns, but the header has 2\."),
        (b"id,text\n1,\xff\n", r":1: not UTF-8 "),
        (b"id,body\n1,good\n", r":2: has no .text., but id, body; set data.text_key \(--text-key\) to one"),
    ],
)
def test_bad_table_is_refused_where_it_is_bad(content: bytes, says: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare_corpus([path], tmp_path / "out", Encoder.of(tokenizer))


def test_stopped_run_goes_on(source: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.of(tokenizer)
    prepare_corpus([source], tmp_path / "whole", encoder)
    done: list[int] = []
    encode_part = corpus._encode_part

    def stops(part: TextPart, target: Path, encoder: Encoder, on_bad_record: str) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        encode_part(part, target, encoder, on_bad_record)

    monkeypatch.setattr(corpus, "_encode_part", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus([source], tmp_path / "c", encoder, part_bytes=1000)
    assert not (tmp_path / "c.idx").exists()
    monkeypatch.setattr(corpus, "_encode_part", encode_part)
    assert prepare_corpus([source], tmp_path / "c", encoder, part_bytes=1000).reused_parts == 5
    assert both_files(tmp_path / "c") == both_files(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".c")] == []


def test_changed_input_takes_over_nothing(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    encoder = Encoder.of(tokenizer)
    parts = split_into_parts(source, "text", 1000)
    before = corpus._plan_hash(parts, encoder, "stop")
    os.utime(source, (1, 1))
    assert corpus._plan_hash(parts, encoder, "stop") != before
    assert corpus._plan_hash(parts, Encoder.of(tokenizer, eos=False), "stop") != corpus._plan_hash(
        parts, encoder, "stop"
    )


def test_records_without_text_are_skipped_and_kept(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "some.jsonl"
    bad = ['{"text": null}', "broken", '{"body": "a"}', "[1]", '{"text": 7}']
    path.write_text("\n".join(['{"text": "one"}', *bad, '{"text": " "}', '{"text": "two"}']))
    made = prepare_corpus([path], tmp_path / "c", Encoder.of(tokenizer), on_bad_record="skip", part_bytes=30)
    assert (made.documents, made.empty, made.skipped) == (2, 1, 5)
    kept = [json.loads(line) for line in (tmp_path / "c.skipped.jsonl").read_text().splitlines()]
    assert [entry["why"].partition(": ")[0] for entry in kept] == [f"{path}:{n}" for n in range(2, 7)]
    assert kept[0]["record"] == {"text": None}
    assert "1 empty texts left out, 5 record(s) skipped, see" in made.left_out()
    with pytest.raises(DataError, match=r"some\.jsonl:2: 'text' is null, not text"):
        prepare_corpus([path], tmp_path / "d", Encoder.of(tokenizer))
    with pytest.raises(DataError, match="must be 'stop' or 'skip'"):
        prepare_corpus([path], tmp_path / "d", Encoder.of(tokenizer), on_bad_record="ignore")


@pytest.mark.parametrize("part_bytes", range(1, 40))
def test_a_line_of_any_white_space_is_blank_where_a_file_is_cut_too(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\ufeff\none\n\u3000\ntwo\nlines\n\xa0 \nthree\n", "utf-8")
    parts = split_into_parts(path, "text", part_bytes)
    assert [text for part in parts for text in documents(part)] == ["one", "two\nlines", "three"]


@pytest.mark.parametrize("part_bytes", [5, 14, 1 << 20])
def test_a_plain_text_document_that_is_not_utf8_is_a_bad_record(
    tmp_path: Path, tokenizer: Any, part_bytes: int
) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\n\nfine\ncaf\xe9\nfine\n\ntwo\n\n\xff\n")
    settings = {"part_bytes": part_bytes, "on_bad_record": "skip"}
    made = prepare_corpus([path], tmp_path / "c", Encoder.of(tokenizer), **settings)
    assert (made.documents, made.skipped) == (2, 2)
    kept = [json.loads(line) for line in (tmp_path / "c.skipped.jsonl").read_text("utf-8").splitlines()]
    assert [one["record"] for one in kept] == ["fine\ncaf\ufffd\nfine", "\ufffd"]
    assert f"{path}:4: not UTF-8" in kept[0]["why"]
    with pytest.raises(DataError, match=rf"{path}:4: not UTF-8"):
        prepare_corpus([path], tmp_path / "d", Encoder.of(tokenizer), part_bytes=part_bytes)


def json_of(texts: list[str]) -> dict[str, str]:
    """JSON files that hold documents, by name."""
    rows = [{"text": text} for text in texts]
    return {
        "list.json": json.dumps(rows),
        "lines.json": "\n".join(map(json.dumps, rows)),
        "pretty.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "data.json": json.dumps({"version": 1, "data": rows}),
        "list.jsonl": json.dumps(rows, indent=1),
        "splits.json": json.dumps({"validation": [{"text": "held out"}], "training": rows}),
    }


@pytest.mark.parametrize("name", json_of([]))
def test_json_in_any_arrangement_holds_documents(name: str, tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(5)]
    (tmp_path / name).write_text(json_of(texts)[name])
    parts = split_into_parts(tmp_path / name, "text", 40)
    assert [text for part in parts for text in documents(part)] == texts
    if name == "splits.json":
        (part,) = split_into_parts(tmp_path / name, "text", 40, "validation")
        assert list(documents(part)) == ["held out"]


def test_existing_corpus_is_kept(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    encoder = Encoder.of(tokenizer)
    prepare_corpus([source], tmp_path / "c", encoder)
    with pytest.raises(DataError, match="exists; choose another --output, or pass --overwrite"):
        prepare_corpus([source], tmp_path / "c", encoder)
    prepare_corpus([source], tmp_path / "c", encoder, overwrite=True)


def test_of_two_at_once_one_makes_it_and_the_other_finds_it(source: Path, tmp_path: Path, tokenizer: Any) -> None:
    def prepare(number: int) -> str:
        try:
            return str(prepare_corpus([source], tmp_path / "c", Encoder.of(tokenizer), part_bytes=1000).documents)
        except DataError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(prepare, range(2)), key=len)
    assert said[0] == str(len(TEXTS))
    assert "exists; choose another --output" in said[1]


@pytest.mark.parametrize("written", ["tokens", "index"])
def test_existing_corpus_is_kept_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    encoder = Encoder.of(tokenizer)
    prepare_corpus([source], tmp_path / "c", encoder)
    before = both_files(tmp_path / "c")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"tokens": (corpus.shutil, "copyfileobj"), "index": (corpus, "write_index")}[written], full)
    source.write_text(source.read_text() * 2)
    for name in ("c", "new"):
        with pytest.raises(OSError, match="No space left") as full_disk:
            prepare_corpus([source], tmp_path / name, encoder, overwrite=True)
        assert full_disk.value.filename == {"tokens": f"{tmp_path / name}.bin", "index": None}[written]
    assert both_files(tmp_path / "c") == before
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        source.name, "c.bin", "c.idx", "c.prepared.json",
    }  # fmt: skip


def test_nothing_to_prepare(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no documents"):
        prepare_corpus([tmp_path / "empty.jsonl"], tmp_path / "c", Encoder.of(tokenizer))
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match="unknown file type"):
        prepare_corpus([tmp_path / "a.pdf"], tmp_path / "c", Encoder.of(tokenizer))


@pytest.mark.slow
def test_killed_command_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() * 200)
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", "data", "prepare", str(source), "--tokenizer"]
    command += ["embedded://mixtral_tiny", "--workers", "1", "--part-mb", "1", "-o"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".killed.*/[!.]*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.idx").exists()
    again = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, check=True)
    assert "reused from an earlier run" in again.stderr
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    assert both_files(tmp_path / "killed") == both_files(tmp_path / "whole")
