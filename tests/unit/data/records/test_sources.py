"""Where data comes from, what it is taken for, and what errors say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.data import recognize
from mixtral_recipes.data.corpus_paths import check_place, own_splits
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.data.records.parse import read_records
from mixtral_recipes.errors import DataError

ROWS = [{"input": f"in {n}", "output": f"out {n}"} for n in range(30)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_all_kinds(folder: Path) -> list[Path]:
    import csv
    import gzip

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl = write_jsonl(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    (folder / "c.json").write_text(json.dumps(ROWS, indent=2))
    (folder / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (folder / "e.json").write_bytes(jsonl.read_bytes())
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "f.parquet")
    for name, delimiter in (("g.csv", ","), ("h.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["input", "output"], *(list(r.values()) for r in ROWS)])
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "arrow"))
    return [*(path for path in sorted(folder.iterdir()) if path.is_file()), *(folder / "arrow").glob("*.arrow")]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    paths = write_all_kinds(tmp_path)
    assert len(paths) == 9
    for path in paths:
        assert [record.value for record in read_records(path)] == ROWS, path.name


def test_records_of_a_json_list_have_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n  {"a": 1},\n  {\n    "a": 2\n  },\n\n  {"a": 3}\n]\n')
    assert [record.where for record in read_records(tmp_path / "a.json")] == [
        f"{tmp_path}/a.json:{n}" for n in (2, 3, 7)
    ]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("training.jsonl", "validation.jsonl", "test.jsonl"), {"train": 1, "validation": 1, "test": 1}),
        (("train.jsonl", "dev.jsonl"), {"train": 1, "validation": 1}),
        (("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"), {"train": 2}),
        (("train/a.jsonl", "val/b.jsonl"), {"train": 1, "validation": 1}),
        (("pretraining.jsonl",), {"train": 1}),
        (("data-00000-of-00002.jsonl", "data-00001-of-00002.jsonl", "state.json", "dataset_info.json"), {"train": 2}),
        (("train/data-0.jsonl", "train/state.json", "dataset_dict.json"), {"train": 1}),
        (("train.jsonl", ".ipynb_checkpoints/train.jsonl"), {"train": 1}),
        (
            ("snapshots/ab/data/train.jsonl", "snapshots/ab/data/validation.jsonl", "refs/x"),
            {"train": 1, "validation": 1},
        ),
    ],
)
def test_folder_splits(tmp_path: Path, names: tuple[str, ...], splits: dict[str, int]) -> None:
    for name in names:
        write_jsonl(tmp_path / name, ROWS)
    assert {split: len(paths) for split, paths in open_source(tmp_path).files.items()} == splits


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_no_split_are_named(
    tmp_path: Path, tokenizer: Any, streaming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.jsonl", "more.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    for name in ("notes.txt", "README.md"):
        (tmp_path / name).write_text("x")
    assert "one split (not in any split, so not read: more.jsonl, notes.txt)," in recognize(tmp_path).description
    FineTuningDataModule(dataset_root=tmp_path, seq_length=32, streaming=streaming).setup(tokenizer)
    told = f"data: not read, because they are in no split of {tmp_path}: more.jsonl, notes.txt"
    assert capsys.readouterr().err.splitlines().count(told) == 1


def test_a_hubs_cache_is_read_at_its_current_revision(tmp_path: Path) -> None:
    for revision in ("ab", "cd"):
        write_jsonl(tmp_path / "snapshots" / revision / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="has 2 revisions; pass one of them"):
        open_source(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("cd")
    assert open_source(tmp_path).files == {"train": [tmp_path / "snapshots" / "cd" / "train.jsonl"]}


def test_a_column_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "x.csv").write_text("input,input,output\na,b,c\n")
    columns = [pa.array(["a"])] * 3
    pq.write_table(pa.Table.from_arrays(columns, names=["input", "input", "output"]), tmp_path / "x.parquet")
    for path in (tmp_path / "x.csv", tmp_path / "x.parquet"):
        with pytest.raises(DataError, match="the column 'input' appears twice"):
            list(read_records(path))


def test_missing_sources_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not set; set it to a file, a folder or a Hub id"):
        open_source(None)
    with pytest.raises(DataError, match="no such file or folder, and not a Hub id"):
        open_source(tmp_path / "nothing.jsonl")
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=r"no training split \(train or training"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("row", "module", "shape"),
    [
        ({"input": "a", "output": "b"}, "FineTuningDataModule", "input -> output"),
        ({"prompt": "a", "completion": "b"}, "FineTuningDataModule", "prompt -> completion"),
        ({"instruction": "a", "response": "b", "category": "c"}, "FineTuningDataModule", "instruction -> response"),
        ({"question": "a", "answer": "b"}, "FineTuningDataModule", "question -> answer"),
        ({"messages": []}, "ChatDataModule", "messages"),
        ({"conversations": [], "id": 1}, "ChatDataModule", "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "ChatDataModule", "alpaca"),
        ({"context": "a", "question": "b", "answers": {"text": ["c"]}}, "SquadDataModule", "SQuAD"),
        ({"text": "a"}, "PreTrainingDataModule", "documents"),
    ],
)
def test_records_are_recognised(tmp_path: Path, row: dict[str, Any], module: str, shape: str) -> None:
    found = recognize(write_jsonl(tmp_path / "x.jsonl", [row] * 3))
    assert found.module_class.__name__ == module
    assert shape in found.description
    assert found.kwargs.get("dataset_root", found.kwargs.get("paths", [""])[0]) == str(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": 1, "query": "q", "answers": "[]", "tools": "[]"}, "xlam's function calls: write `messages`"),
        ({"system": "SYSTEM: x", "chat": "USER: a"}, "glaive's function calls: split the text of `chat`"),
        ({"document": {}, "question": {"text": "q"}, "annotations": []}, "Natural Questions: write the text"),
        ({"translation": {"de": "Hallo", "en": "Hello"}}, "write one language's as `input`"),
        ({"segments": [{"label": True, "text": "a"}]}, "Axolotl's segments: write what is not learned"),
    ],
)
def test_well_known_forms_that_are_not_read_say_how_to_write_them(
    tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row] * 3)
    with pytest.raises(DataError, match=f"which is the form of .*{told}"):
        recognize(path)


def test_other_things_that_are_recognised(tmp_path: Path) -> None:
    assert recognize("squad").kwargs == {"dataset_root": None}
    assert recognize("embedded://squad").module_class.__name__ == "SquadDataModule"
    assert "not read" not in recognize("embedded://squad").description
    assert recognize("embedded://squad/train.json").kind == "squad"
    (tmp_path / "c.bin").touch()
    (tmp_path / "c.idx").touch()
    for spec in ("c", "c.bin", "c.idx"):
        assert recognize(tmp_path / spec).kind == "corpus"
    (tmp_path / "book.txt").write_text("It was a dark night.")
    assert recognize(tmp_path / "book.txt").module_class.__name__ == "PreTrainingDataModule"
    with pytest.raises(DataError, match="records have a, b, which is not a known format"):
        recognize(write_jsonl(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}]))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad.jsonl:1: not JSON"):
        recognize(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("names", "row", "kind", "says"),
    [
        ("part-0.jsonl part-1.jsonl", {"text": "a"}, "text", "documents (text), one split"),
        ("train-0.jsonl valid.jsonl", {"text": "a"}, "text", "documents (text), splits train, validation"),
        ("a.txt b.md", "It was a dark night.", "text", "plain text, documents between blank lines, 2 file(s)"),
        ("a.bin a.idx b.bin b.idx", "", "corpus", "indexed corpora (.bin and .idx), 2 file(s)"),
        ("train.jsonl", {"messages": []}, "chat", "messages"),
    ],
)
def test_folders_are_recognised(tmp_path: Path, names: str, row: Any, kind: str, says: str) -> None:
    for name in names.split():
        (tmp_path / name).write_text(row) if isinstance(row, str) else write_jsonl(tmp_path / name, [row] * 3)
    found = recognize(tmp_path)
    assert found.kind == kind
    assert says in found.description


@pytest.mark.parametrize("missing", ["b.bin", "b.idx"])
@pytest.mark.parametrize("named", ["", "b", "b.bin", "b.idx"])
def test_half_a_corpus_is_refused(tmp_path: Path, missing: str, named: str) -> None:
    for name in {"a.bin", "a.idx", "b.bin", "b.idx"} - {missing}:
        (tmp_path / name).touch()
    for read in (recognize, check_place):
        with pytest.raises(DataError, match=f"{missing}: no such file"):
            read(str(tmp_path / named))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("a.bin a.idx a.jsonl README.md", "corpora (.bin and .idx), 1 file(s), splits train; not read: a.jsonl"),
        ("train.bin train.idx c.bin c.idx", "1 file(s), splits train; not read: c.idx"),
        ("train.txt more.txt LICENSE.txt", "1 file(s), splits train; not read: more.txt"),
        ("a.txt b.txt README.md", "2 file(s), splits train"),
    ],
)
def test_what_is_not_read_in_a_folder_of_corpora_or_text_is_named(tmp_path: Path, names: str, says: str) -> None:
    for name in names.split():
        (tmp_path / name).write_text("It was a dark night.")
    assert recognize(tmp_path).description.endswith(says)


def test_a_folder_of_other_records_needs_a_training_split(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"input": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"no training split \(train or training"):
        recognize(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: has neither corpora \(.bin and .idx\) nor text files"):
        recognize(tmp_path / "empty")


def test_hub_data_sets_are_read_by_name_config_and_revision(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    asked = []

    def load_dataset(repo: str, config: str | None = None, revision: str | None = None) -> Any:
        asked.append((repo, config, revision))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert open_source("org/name").splits == ["train", "test"]
    open_source("hf://org/name:config@refs/pr/1")
    assert asked == [("org/name", None, None), ("org/name", "config", "refs/pr/1")]
    assert recognize("org/name").kwargs == {"dataset_root": "org/name"}
    module = FineTuningDataModule(dataset_root="org/name", seq_length=32)
    module.setup(tokenizer)
    assert [len(module._sets[name]) for name in ("train", "validation", "test")] == [28, 2, 2]  # pyright: ignore[reportArgumentType]


def test_splits_on_the_hub_that_are_not_read_are_named(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(train_sft=rows, test_sft=rows, train_gen=rows, unsupervised=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    assert "(not in any split, so not read: train_gen, unsupervised)" in recognize("org/name").description
    FineTuningDataModule(dataset_root="org/name", seq_length=32).setup(tokenizer)
    assert (
        "data: not read, because they are in no split of org/name: train_gen, unsupervised" in capsys.readouterr().err
    )


def test_a_json_file_with_two_names_of_one_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"train": ROWS, "dev": ROWS, "validation": ROWS}))
    for read in (open_source, own_splits):
        with pytest.raises(DataError, match=r"all.json: dev and validation name the same split"):
            read(str(path))


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"org/name: .*Couldn't reach the Hub\); check the name and the network"):
        open_source("org/name")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [], "rejected": []},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "b", "label": 0},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": False},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected_response": "c",
        },
        {"input": "a", "output": "b", "rejected": "c"},
        {"question": "a", "response_j": "b", "response_k": "c"},
        {"input": "a", "preferred_output": [], "non_preferred_output": []},
    ],
)
def test_preference_pairs_are_refused_by_name(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"x.jsonl: preference pairs .* needs a preference loss \(DPO, KTO\)"):
        recognize(write_jsonl(tmp_path / "x.jsonl", [row] * 3))


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [U], "completion": "a"},
        {"prompt": "q", "completion": [A]},
        {"prompt": U, "completion": A},
        {"prompt": json.dumps([U]), "completion": json.dumps([A])},  # as tables hold it
        {"prompt": json.dumps([U]), "response": json.dumps(A)},
        {"input": [U], "output": "a"},
        {"dialogue": [U, A]},
        {"Messages": json.dumps([U, A])},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 1},
        {"messages": [{**U, "content": [{"type": "text", "text": "q"}]}, A], "system": "", "tools": None},
        {"messages": [{"role": "system", "content": None}, U, A]},
    ],
)
def test_turns_are_found_in_whatever_field_and_form(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = recognize(write_jsonl(tmp_path / "x.jsonl", [row])).module().pipeline().examples("train")
    messages = [message for message in example.content.messages if message["content"]]
    assert [message["content"] for message in messages] == ["q", "a"]
    assert example.content.learned[-2:] == [False, True]
    assert set(example.content.unused) <= {"id"}


def test_text_in_brackets_is_no_conversation(tmp_path: Path) -> None:
    for row in ({"prompt": "[1] q", "completion": '["role"]'}, {"prompt": '{"role": 1', "completion": "[]"}):
        found = recognize(write_jsonl(tmp_path / "x.jsonl", [row]))
        (example,) = found.module().pipeline().examples("train")
        assert (found.kind, example.content.prompt) == ("pairs", row["prompt"])


def test_a_preference_pair_among_conversations_is_not_learned(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [U, A]}] * 30 + [{"messages": [U, A], "rejected": "b"}])
    with pytest.raises(DataError, match=r"x.jsonl:31: is a preference pair"):
        list(recognize(path).module().pipeline().examples("train"))


@pytest.mark.parametrize(("name", "table"), [("x.csv", True), ("x.jsonl", False)])
def test_unanswerable_in_every_spelling(tmp_path: Path, name: str, table: bool) -> None:
    """A question that says it has no answer is learned so, whatever stands in its answers."""
    said = ["True", "1", "false", "0", "maybe"] if table else [True, 1, False, 0, "maybe"]
    answers = ['{"text": ["x"]}', "x", "x", "1998", "x"]
    rows = [
        {"context": f"c{n}", "question": "q", "answers": answer, "is_impossible": value}
        for n, (value, answer) in enumerate(zip(said, answers, strict=True))
    ]
    path = tmp_path / name
    if table:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_jsonl(path, rows)
    pipeline = recognize(path).module(val_proportion=0).pipeline()
    errors: list[str] = []
    found = [e.content.answer for e in pipeline.examples("train", lambda error, record=None: errors.append(str(error)))]
    assert found == [" unanswerable", " unanswerable", " x", " 1998"]
    assert len(errors) == 1
    assert "'is_impossible' is 'maybe'" in errors[0]
    write_jsonl(tmp_path / "repr.jsonl", [rows[2] | {"answers": "{'text': array(['x'])}"}])
    with pytest.raises(DataError, match="'answers' is text that is not JSON"):
        list(recognize(tmp_path / "repr.jsonl").module().pipeline().examples("train"))


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_what_is_held_out_is_a_share(tmp_path: Path, share: float) -> None:
    found = recognize(write_jsonl(tmp_path / "x.jsonl", ROWS))
    with pytest.raises(DataError, match=f"data.val_proportion={share} must be a share of the records"):
        found.module(val_proportion=share).pipeline()


def test_a_dry_run_refuses_a_set_nothing_is_learned_from(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [U, A | {"weight": 0}]}] * 3)
    with pytest.raises(DataError, match=r"no training samples \(3: no turn to learn from\)"):
        recognize(path).module().pipeline().check()


def test_no_record_needs_all_fields(tmp_path: Path) -> None:
    """Each field stands in two records of three, and in none all of them; null is as good as absent."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk, "x": 1, "y": 1}, {"messages": talk, "y": 1, "z": 1}, {"messages": talk, "x": 1, "z": 1}]
    assert recognize(write_jsonl(tmp_path / "x.jsonl", rows * 3)).kind == "chat"
    rows = [{"input": "a", "output": "b", "messages": None}] * 3 + [{"oops": 1}]
    assert recognize(write_jsonl(tmp_path / "x.jsonl", rows)).kind == "pairs"
    with pytest.raises(DataError, match="records have a, which is not a known format"):
        recognize(write_jsonl(tmp_path / "x.jsonl", [{"a": 1, "b": 2}, {"a": 1, "c": 2}, {"a": 1, "d": 2}]))


def test_pairs_in_a_wrapper_are_no_conversation(tmp_path: Path) -> None:
    """As a JSON file they are records; in a line of JSON lines nothing says that they belong together."""
    pairs = [{"input": f"q{n}", "output": "a"} for n in range(4)]
    (tmp_path / "x.json").write_text(json.dumps({"data": pairs}))
    assert recognize(tmp_path / "x.json").kind == "pairs"
    with pytest.raises(DataError, match="records have data, which is not a known format"):
        recognize(write_jsonl(tmp_path / "x.jsonl", [{"data": pairs}]))
    assert recognize(write_jsonl(tmp_path / "x.jsonl", [{"exchanges": pairs}])).kind == "chat"
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": {"train": pairs, "test": pairs}}))
    with pytest.raises(DataError, match="'data' is an object with 'train', 'test'; move that to the top level"):
        recognize(tmp_path / "x.json")


def test_columns_beside_a_pair_make_it_a_conversation(tmp_path: Path) -> None:
    assert (
        recognize(write_jsonl(tmp_path / "x.jsonl", [{"system": "s", "prompt": "a", "response": "b"}])).kind == "chat"
    )
    row = {"system_prompt": "s", "question": "a", "response": "b"}
    found = recognize(write_jsonl(tmp_path / "x.jsonl", [row]))
    (example,) = found.module().pipeline().examples("train")
    assert [message["content"] for message in example.content.messages] == ["s", "a", "b"]
    row = {"instruction": "i", "context": "c", "response": "r", "category": "x"}
    (example,) = recognize(write_jsonl(tmp_path / "x.jsonl", [row])).module().pipeline().examples("train")
    assert [message["content"] for message in example.content.messages] == ["i\n\nc", "r"]
    assert dict(example.content.unused) == {"category": 1}


def test_squad_2_is_recognised_and_its_unanswerable_questions_are_learned(tmp_path: Path) -> None:
    qas = [
        {"id": "a", "question": "Which?", "answers": [{"text": "green", "answer_start": 0}], "is_impossible": False},
        {"id": "b", "question": "How?", "answers": [], "plausible_answers": [{"text": "x"}], "is_impossible": True},
        {"id": "c", "question": "How?", "answers": [{"text": "x"}], "is_impossible": True},
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": "Green.", "qas": qas}]}]}))
    found = recognize(path)
    assert "learned as 'unanswerable' unless data.no_answer is set" in found.description
    assert [e.content.answer for e in found.module().pipeline().examples("train")] == [" green"] + [" unanswerable"] * 2
    skipping = found.module(no_answer="skip").pipeline()
    assert [bool(e.content.left_out) for e in skipping.examples("train")] == [False, True, True]


@pytest.mark.parametrize(
    ("row", "asked", "learned"),
    [
        (
            {"question": "q", "context": "TABLE", "answer": "a"},
            ["q\n\nTABLE"],
            ["a"],
        ),
        ({"instruction": "i", "input": "x", "response": "a"}, ["i\n\nx"], ["a"]),  # GPTeacher
        ({"instruction": "i", "context": "c", "output": "a"}, ["i\n\nc"], ["a"]),
        ({"query": "q2", "response": "a2", "history": [["q1", "a1"]]}, ["q1", "q2"], ["a1", "a2"]),  # ms-swift
        ({"conversations": ["q", "a", "q2", "a2"], "source": "x"}, ["q", "q2"], ["a", "a2"]),  # LIMA
        ({"conversation": [{"input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]}, ["q", "q2"], ["a", "a2"]),
        ({"conversation": {"input": ["q", "q2"], "output": ["a", "a2"]}}, ["q", "q2"], ["a", "a2"]),  # as a table
        ({"messages": [{"role": "system", "content": "s"}, U, A], "system": "s"}, ["s", "q"], ["a"]),  # OpenHermes
        (
            {"mask": "User", "conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]},
            ["q"],
            ["a"],
        ),  # NeMo
    ],
)
def test_nothing_of_a_prompt_is_left_out(tmp_path: Path, row: Any, asked: list[str], learned: list[str]) -> None:
    found = recognize(write_jsonl(tmp_path / "x.jsonl", [row] * 2))
    example = next(iter(found.module().pipeline().examples("train")))
    assert list(example.content.texts(learned=False)) == asked
    assert list(example.content.texts(learned=True)) == learned


@pytest.mark.parametrize(
    ("row", "columns", "kind", "kwargs"),
    [
        (
            {"dialogue": "d", "summary": "s"},
            {"input": "dialogue", "output": "summary"},
            "pairs",
            {"columns": {"input": "dialogue", "output": "summary"}},
        ),
        ({"question": "q", "answer": "5", "solution": "s"}, {"input": "question", "output": "solution"}, "pairs", {}),
        ({"question": "q", "answer": "a", "context": {"t": ["x"]}}, {"context": None}, "chat", {}),
        ({"content": "import x", "stars": 1}, {"text": "content"}, "text", {"text_key": "content"}),
    ],
)
def test_columns_say_what_an_unknown_form_is(tmp_path: Path, row: Any, columns: Any, kind: str, kwargs: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row] * 3)
    with pytest.raises(DataError):
        recognize(path).module().pipeline().check()
    found = recognize(path, columns)
    assert found.kind == kind
    assert kwargs.items() <= found.kwargs.items()
    if kind != "text":
        found.module().pipeline().check()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question": "q", "answer": "5", "solution": "s"},
            r"\(question -> answer, question -> solution\); choose one",
        ),
        ({"prompt": "p", "instruction": "i", "response": "r"}, r"\(prompt -> response, instruction -> response\)"),
        (
            {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
            "each record is one message",
        ),  # oasst
    ],
)
def test_what_is_unclear_is_asked(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        recognize(write_jsonl(tmp_path / "x.jsonl", [row] * 3))


def test_fields_beside_a_document_are_named(tmp_path: Path) -> None:
    found = recognize(write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "from": "a@b.org", "label": 1}]))
    assert found.description.endswith("loss on every token; not read: from, label")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train_sft-00000-of-00001 train_gen-00000-of-00001 test_sft-00000-of-00001", {"train": "train_sft"}),
        ("c4-train.00000-of-00002 c4-train.00001-of-00002 c4-validation.00000-of-00001", {"train": "c4-train"}),
        ("train my-test", {"train": "train"}),
    ],
)
def test_published_names_of_splits(tmp_path: Path, names: str, splits: dict[str, str]) -> None:
    for name in names.split():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": [U, A]}])
    files = open_source(tmp_path).files
    for split, start in splits.items():
        assert files[split] == sorted(tmp_path.glob(f"{start}*"))
    assert ("my-test" in names) is (list(files) == ["train"])


def test_several_folders_taken_together_are_named(tmp_path: Path) -> None:
    for config in ("main", "socratic"):
        (tmp_path / config).mkdir()
        write_jsonl(tmp_path / config / "train.jsonl", [{"question": "q", "answer": "a"}])
    assert "(from 2 folders together: main, socratic)" in recognize(tmp_path).description


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("elsewhere/more/b.jsonl", "data/train/a.jsonl", "held/c.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    (folder / "train" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (folder / "train" / "back").symlink_to(folder)  # a way round without end
    (folder / "validation").symlink_to(tmp_path / "held")
    names = {
        split: [str(file.relative_to(folder)) for file in some] for split, some in open_source(folder).files.items()
    }
    assert names == {"train": ["train/a.jsonl", "train/more/b.jsonl"], "validation": ["validation/c.jsonl"]}


@pytest.mark.parametrize("link", ["latest", "v3"])
def test_a_folder_that_is_there_twice_is_refused(tmp_path: Path, link: str) -> None:
    for name in ("v1", "v2"):
        write_jsonl(tmp_path / name / "a.jsonl", ROWS)
    (tmp_path / link).symlink_to("v2")
    with pytest.raises(DataError, match=f"{tmp_path}/.* and {tmp_path}/.* are the same folder, .* read twice; remove"):
        recognize(tmp_path)


def test_a_folder_with_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "notes"):
        write_jsonl(tmp_path / name, ROWS)
    (tmp_path / "a-note").symlink_to("gone")
    assert open_source(tmp_path).files["train"] == [tmp_path / "train-00000-of-00002.jsonl"]
    lost = tmp_path / "train-00001-of-00002.jsonl"
    lost.symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.jsonl: a link to gone\.jsonl, which does not exist"):
        recognize(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder, and not a Hub id \(org/name\)\.$"):
        recognize(lost.rename(tmp_path / "x.jsonl"))


def test_a_folder_inside_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("train.jsonl", "train/a.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    look = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "train":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"train: cannot be read \(Permission denied\)"):
        open_source(tmp_path)


def test_a_readme_is_no_document(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"text": "A dark night."}])
    for name in ("README.md", "LICENSE.txt"):
        (tmp_path / name).write_text("About them.")
    found = recognize(tmp_path)
    assert found.kind == "text"
    assert found.source
    assert [record.value for record in found.source.records("train")] == [{"text": "A dark night."}] * 2
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, ROWS[:2])
    with pytest.raises(DataError, match=r"no training split .* found a\.jsonl, b\.jsonl"):
        recognize(tmp_path)


@pytest.mark.parametrize("names", ["a.jsonl", "a.jsonl b.jsonl"])
def test_records_beside_plain_text_are_not_half_read(tmp_path: Path, names: str) -> None:
    for name in names.split():
        write_jsonl(tmp_path / name, [{"text": "A dark night."}])
    (tmp_path / "notes.txt").write_text("It rained.")
    with pytest.raises(DataError, match=r"documents in records and in plain text \(notes\.txt\)"):
        recognize(tmp_path)
    for name in names.split():
        (tmp_path / name).rename(tmp_path / f"valid-{name}")
    (tmp_path / "notes.txt").rename(tmp_path / "train.txt")
    with pytest.raises(DataError, match=r"documents in records and in plain text \(train\.txt\)"):
        recognize(tmp_path)


def test_rows_that_a_quote_takes_in_are_named(tmp_path: Path) -> None:
    path = tmp_path / "quotes.csv"
    told: list[str] = []

    def bad(error: DataError, *_: Any) -> None:
        told.append(str(error))

    path.write_text('input,output\nq1,a1\n"q2,a2\nq3,a3\nq4,"a4\nq5,a5\n')
    assert [row["input"] for row, *_ in read_records(path, bad)] == ["q1", "q5"]
    assert len(told) == 1
    assert told[0].startswith(f"{path}:3: not a CSV row (the row goes on to line 5) (")
    path.write_text('input,output\nq1,a1\n"q2,a2\nq3,a3\n')
    with pytest.raises(DataError, match=r"quotes\.csv:3: a quotation mark opens in this row and is never closed\."):
        list(read_records(path, bad))
    path.write_text('input,output\n"q1\nq2\n"\nq3,a3\n')
    assert [row["input"] for row, *_ in read_records(path, bad)] == ["q3"]
    assert told[1] == f"{path}:2: has 1 columns (the row goes on to line 4), but the header has 2."
