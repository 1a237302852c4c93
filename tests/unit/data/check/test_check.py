"""`data check`: every kind of defect is named with its line, and nothing is blamed that is sound."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.data import recognize
from mixtral_recipes.data.check.check import Report, check
from mixtral_recipes.data.check.histogram import bars, save_png
from mixtral_recipes.data.corpus import Encoder, prepare_corpus
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.errors import DataError

GOOD = {"input": "Which farm lies at the end of the road?", "output": "Ashby Farm"}


def good(number: int) -> str:
    return json.dumps({"input": f"{GOOD['input']} No. {number}", "output": f"{GOOD['output']} {number}"})


# Each line of the file after ten sound ones: (line as bytes, level, part of what is said).
PAIR_DEFECTS: list[tuple[bytes, str, str]] = [
    (b'{"input": "cut off', "error", "not JSON"),
    (b'{"input": "a1", "output": "b"} {"input": "c", "output": "d"}', "error", "not JSON (Extra data"),
    (b'["a", "b"]', "error", "is a list, not an object"),
    (b'"only text"', "error", "is a text, not an object"),
    (b'{"input": "\xe9", "output": "latin-1"}', "error", "not UTF-8"),
    (b'{"input": "a2"}', "error", "'output' is missing"),
    (b'{"output": "b"}', "error", "'input' is missing"),
    (b'{"input": "a3", "output": null}', "error", "'output' is missing"),
    (b'{"input": "a4", "output": 42}', "error", "'output' is int, not text"),
    (b'{"input": {"a": 1}, "output": "b"}', "error", "'input' is dict, not text"),
    (b'{"input": "a5", "output": ""}', "error", "'output' is empty"),
    (b'{"input": "a6", "output": " \\n\\t"}', "error", "'output' is empty"),
    (b'{"input": "a7", "input": "b", "output": "c"}', "error", "field 'input' appears twice"),
    (b'{"input": "a8", "output": "b", "score": NaN}', "error", "NaN is not JSON"),
    (b'{"input": "a\\ud83d", "output": "b"}', "error", "contains half of a UTF-16 pair"),
    (b"[" * 100_000, "error", "nested too deeply"),
    (json.dumps({"input": "a9", "output": "long " * 200}).encode(), "warning", "answer cut"),
    (json.dumps({"input": "long " * 200, "output": "b"}).encode(), "warning", "prompt cut"),
    (good(3).encode(), "warning", "duplicate: the same record as {file}:4"),
    (json.dumps(json.loads(good(4)) | {"output": "x"}).encode(), "warning", "same prompt, other answer: the prompt of {file}:5"),  # noqa: E501
    (b'{"input": "a\\u0000b", "output": "c"}', "warning", "control characters"),
    (b'{"input": "a\\ufffdb", "output": "c"}', "warning", "replacement characters"),
    (b'{"input": "a </s> b", "output": "c"}', "warning", "special token spelled out: '</s>'"),
    (b'{"input": "the same", "output": "the same"}', "warning", "answer repeats the prompt"),
    (b'{"input": " ", "output": "to nothing"}', "warning", "empty prompt"),
]  # fmt: skip


def told(report: Report, line: str) -> list[str]:
    return [f"{f.level}: {f.kind}: {f.detail}" for f in report.findings if f.where == line]


def test_every_defect_is_named_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [good(n).encode() for n in range(10)] + [line for line, _, _ in PAIR_DEFECTS]
    path.write_bytes(b"\n".join(lines) + b"\n")
    report = check(recognize(path), tokenizer, seq_length=128)
    assert len(PAIR_DEFECTS) >= 20
    for number, (_, level, says) in enumerate(PAIR_DEFECTS, 11):
        found = told(report, f"{path}:{number}")
        assert any(f.startswith(level) and says.format(file=path) in f for f in found), (number, says, found)
    sound = {f"{path}:{number}" for number in range(1, 11)}
    assert not [finding for finding in report.findings if finding.where in sound]
    assert report.errors == sum(level == "error" for _, level, _ in PAIR_DEFECTS)
    assert report.records == {"train": 9 + len(PAIR_DEFECTS) - report.errors, "validation": 1}


@pytest.mark.parametrize("defect", range(len(PAIR_DEFECTS)))
def test_no_defect_gets_past_the_start_of_a_run(tmp_path: Path, tokenizer: Any, defect: int) -> None:
    """An error stops `setup` with its line (or is left out); after `setup` every sample can be read."""
    line, level, _ = PAIR_DEFECTS[defect]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([good(0).encode(), line, good(1).encode()]))
    module = FineTuningDataModule(dataset_root=path, seq_length=128, val_proportion=0)
    if level == "error":
        with pytest.raises(DataError, match=r"pairs\.jsonl:2: "):
            module.setup(tokenizer)
        module.on_bad_record = "skip"
        module.setup(tokenizer)
        assert module.rows("train").tally.skipped == 1
    else:
        module.setup(tokenizer)
    rows = module.rows("train")
    assert len(rows) == (2 if level == "error" else 3)
    assert all(len(rows[n]["tokens"]) <= 129 for n in range(len(rows)))


CHAT_DEFECTS: list[tuple[Any, str]] = [
    ({"messages": []}, "is empty"),
    ({"messages": "Hi"}, "is not one"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "has the unknown role 'narrator'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "has no assistant message"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must start with the user"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "is empty"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "is missing"),
    ({"messages": [{"role": "user", "content": "x"}, 5]}, "is not an object"),
]


def test_conversations(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "chat.jsonl"
    talk = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(5)]
    rows = [{"messages": messages} for messages in talk] + [row for row, _ in CHAT_DEFECTS] + [{"messages": talk[2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(recognize(path), tokenizer)
    for number, (_, says) in enumerate(CHAT_DEFECTS, 6):
        assert any(says in finding for finding in told(report, f"{path}:{number}")), says
    assert any("the same record as" in finding for finding in told(report, f"{path}:{len(rows)}"))


def test_the_sample_is_sound(tokenizer: Any) -> None:
    report = check(recognize("embedded://squad"), tokenizer, seq_length=256)
    assert report.errors == 0
    assert report.records["train"] > 4000


def test_squad_defects_have_lines(tmp_path: Path) -> None:
    qas = [{"id": f"q{n}", "question": "Where?", "answers": [{"text": "Here", "answer_start": 0}]} for n in range(3)]
    qas[1]["answers"] = []
    document = {"data": [{"title": "t", "paragraphs": [{"context": "It is here.", "qas": qas}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(document, indent=1))
    line = next(n for n, text in enumerate(path.read_text().split("\n"), 1) if '"q1"' in text)
    report = check(recognize(path))
    assert [(f.where, f.kind) for f in report.findings if f.level == "error"] == [(f"{path}:{line}", "unusable")]


def test_records_in_two_splits(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(good(n) for n in range(5)))
    (tmp_path / "validation.jsonl").write_text("\n".join([good(9), good(2)]))
    report = check(recognize(tmp_path), tokenizer)
    assert told(report, f"{tmp_path}/validation.jsonl:2") == [
        f"warning: in two splits: the same record as {tmp_path}/train.jsonl:3"
    ]


def test_columns_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('input,output\na,b\nc\nd,"e\nf"\ng,h,i\n')
    report = check(recognize(path))
    assert [(f.where, f.detail) for f in report.findings if f.level == "error"] == [
        (f"{path}:3", "has 1 columns, but the header has 2"),
        (f"{path}:6", "has 3 columns, but the header has 2"),
    ]


def test_documents_are_counted_as_a_corpus_has_them(tmp_path: Path, tokenizer: Any) -> None:
    """By split, with the tokens around each document, and without empty ones."""
    for name, text in (("train/a.txt", "One two.\n\nThree."), ("train/b.md", ""), ("val/c.txt", "Four")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    report = check(recognize(tmp_path), tokenizer)
    assert list(report.tallies) == ["train", "validation"]
    for split, tally in report.tallies.items():
        files = sorted((tmp_path / {"train": "train", "validation": "val"}[split]).iterdir())
        made = prepare_corpus(files, tmp_path / split, Encoder.of(tokenizer))
        assert (tally.samples, tally.tokens, tally.learned) == (made.documents, made.tokens, made.tokens)


def test_a_set_nothing_is_learned_from_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(json.loads(good(n)) | {"weight": 0}) for n in range(4)))
    report = check(recognize(tmp_path / "x.jsonl"), tokenizer)
    assert [(f.kind, f.where) for f in report.findings if f.level == "error"] == [("nothing to learn", "train split")]
    assert report.unusable == 0


def test_histograms(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(good(n) for n in range(50)))
    report = check(recognize(tmp_path / "x.jsonl"), tokenizer)
    assert sum(int(line.split()[-1]) for line in bars(report).splitlines()[1:]) == 50
    save_png(report, tmp_path / "x.png", 128)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
