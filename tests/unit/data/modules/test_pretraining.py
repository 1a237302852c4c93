"""Indexed corpora: blends, splits, text on the fly, document borders, and index maps that are never stale."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_recipes.data import corpus, recognize
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.corpus import Encoder, prepare_corpus, record_of, write_index
from mixtral_recipes.data.corpus_paths import corpora
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule, split_weights
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.system.home import data_home


@pytest.fixture
def prepared_corpus(tmp_path: Path, tokenizer: Any) -> Path:
    return make_corpus(tmp_path / "corpus", tokenizer, "word")


def make_corpus(prefix: Path, tokenizer: Any, word: str, documents: int = 200) -> Path:
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": f"{word} {n}. " * 5}) + "\n" for n in range(documents)))
    prepare_corpus([source], prefix, Encoder.of(tokenizer), overwrite=True)
    return prefix


def module(paths: Any, tokenizer: Any, **fields: Any) -> PreTrainingDataModule:
    made = PreTrainingDataModule(paths=paths, **({"seq_length": 32, "micro_batch_size": 1} | fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Megatron without Transformer Engine warns
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    made.setup(tokenizer)
    return made


def size(made: PreTrainingDataModule, split: str = "train") -> int:
    return len(made.rows(split))


def text_of(made: PreTrainingDataModule, tokenizer: Any, rows: int) -> str:
    batches = made.train_batches(DataParallelPlace())
    return " ".join(tokenizer.decode(next(batches)["tokens"][0]) for _ in range(rows))


def test_sequences_are_full_and_shifted_by_one(prepared_corpus: Path, tokenizer: Any) -> None:
    made = module(str(prepared_corpus), tokenizer)
    batch = next(made.train_batches(DataParallelPlace()))
    assert batch["tokens"].shape == (1, 32)
    assert torch.equal(batch["tokens"][0, 1:], batch["labels"][0, :-1])
    assert batch["loss_mask"].all()
    assert batch["position_ids"].tolist() == [list(range(32))]
    assert not {"padding_mask", "cu_seqlens"} & set(batch)


def test_text_is_tokenized_into_the_cache(prepared_corpus: Path, tokenizer: Any) -> None:
    text = module(str(prepared_corpus.with_suffix(".jsonl")), tokenizer)
    indexed = module(str(prepared_corpus) + ".bin", tokenizer)
    assert size(text) == size(indexed)
    assert text_of(text, tokenizer, 5) == text_of(indexed, tokenizer, 5)


def folder_of_text(folder: Path, names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names.split()):
        lines = (json.dumps({"text": f"{Path(name).stem} {n}. " * 5}) for n in range(200 + number))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(lines))
    return folder


def test_a_folder_of_text_is_one_corpus(tmp_path: Path, tokenizer: Any) -> None:
    folder = folder_of_text(tmp_path / "shards", "part-0.jsonl part-1.jsonl .hidden.jsonl")
    made = module(str(folder), tokenizer, split="1,0,0")
    one = module(str(folder / "part-0.jsonl"), tokenizer, split="1,0,0")
    assert abs(size(made) - 2 * size(one)) < 10
    assert len(corpora(str(folder), tokenizer)) == 1


def test_a_folder_with_a_validation_split_gives_its_own(tmp_path: Path, tokenizer: Any) -> None:
    folder = folder_of_text(tmp_path / "own", "train-0.jsonl train-1.jsonl validation/few.jsonl")
    made = module([str(folder)], tokenizer)
    assert sorted(made._sets) == ["train", "validation"]
    assert "few" not in text_of(made, tokenizer, size(made))
    validation = made.validation_batches(DataParallelPlace(), limit_batches=1)
    assert validation is not None
    assert "few" in tokenizer.decode(next(validation)["tokens"][0])
    assert corpora(str(folder), tokenizer) == corpora(str(folder), tokenizer, split="train")


def test_a_folder_of_corpora(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "corpora"
    folder.mkdir()
    for name in ("few", "many"):
        make_corpus(folder / name, tokenizer, name)
    assert corpora(str(folder), tokenizer) == [str(folder / "few"), str(folder / "many")]
    assert {"few", "many"} <= set(text_of(module(str(folder), tokenizer), tokenizer, 100).split())
    with pytest.raises(DataError, match="corpora has several corpora; give each of them its own weight"):
        module([30, str(folder), 70, str(folder / "few")], tokenizer)


def test_a_hub_data_set_of_documents(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {s: datasets.Dataset.from_dict({"text": [f"{s} {n}. " * 5 for n in range(200)]}) for s in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(rows))
    found = recognize("org/documents")
    assert (found.kind, found.kwargs["paths"]) == ("text", ["hf://org/documents"])
    made = module(found.kwargs["paths"], tokenizer)
    assert "train" in text_of(made, tokenizer, 5)
    assert not list((data_home() / "corpora").glob(".*parquet")), "the text itself is not kept"


def test_tokenizing_goes_on_where_it_was_stopped(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_text(tmp_path / "shards", "a.jsonl b.jsonl c.jsonl")
    encode, done = corpus._encode_part, []

    def stopped(part: Any, target: Path, *more: Any) -> None:
        if part.path.name == "c.jsonl" and len(done) == 2:
            raise KeyboardInterrupt
        done.append(part.path.name)
        encode(part, target, *more)

    monkeypatch.setattr(corpus, "_encode_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        corpora(str(folder), tokenizer)
    done.append("stopped")
    (prefix,) = corpora(str(folder), tokenizer)
    assert done == ["a.jsonl", "b.jsonl", "stopped", "c.jsonl"]
    assert "603 documents" in (said := capfd.readouterr().err)
    assert "2 parts reused from an earlier run" in said
    assert corpora(str(folder), tokenizer) == [prefix]
    assert done[-1:] == ["c.jsonl"]
    assert not list((data_home() / "corpora").glob(".*.parts"))


def test_split(prepared_corpus: Path, tokenizer: Any) -> None:
    made = module(str(prepared_corpus), tokenizer, split="50,30,20")
    sizes = [size(made, split) for split in ("train", "validation", "test")]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert list(module(str(prepared_corpus), tokenizer, split="1,0,0")._sets) == ["train"]


def test_blend_by_weight(tmp_path: Path, tokenizer: Any) -> None:
    few = make_corpus(tmp_path / "few", tokenizer, "few")
    many = make_corpus(tmp_path / "many", tokenizer, "many")
    made = module(
        [10, str(few), 90, str(many)], tokenizer, num_train_samples=100, num_val_samples=8, num_test_samples=8
    )
    text = text_of(made, tokenizer, 100)
    assert 5 * text.count("few") < text.count("many")
    by_size = module([str(few), str(many)], tokenizer)
    assert size(by_size) > 200
    whole = module([10, str(few), 90, str(many)], tokenizer)
    assert abs(size(whole) - size(by_size)) <= 2


def test_paths_per_split(tmp_path: Path, tokenizer: Any) -> None:
    a, b = make_corpus(tmp_path / "a", tokenizer, "first"), make_corpus(tmp_path / "b", tokenizer, "second")
    made = module({"train": [str(a)], "validation": str(b)}, tokenizer)
    validation = made.validation_batches(DataParallelPlace(), limit_batches=1)
    assert validation is not None
    assert "second" in tokenizer.decode(next(validation)["tokens"][0])
    assert "first" in text_of(made, tokenizer, 1)
    with pytest.raises(DataError, match=r"\['val'\] is not a split"):
        module({"train": str(a), "val": str(b)}, tokenizer)


def test_documents_are_kept_apart_when_asked(prepared_corpus: Path, tokenizer: Any) -> None:
    made = module(str(prepared_corpus), tokenizer, reset_attention_mask=True)
    batch = next(made.train_batches(DataParallelPlace()))
    starts = batch["cu_seqlens"].tolist()
    assert starts[0] == 0
    assert starts[-1] == 32
    assert all(batch["position_ids"][0, start] == 0 for start in starts[:-1])
    with pytest.raises(DataError, match="reset_attention_mask needs micro_batch_size=1, not 2"):
        module(str(prepared_corpus), tokenizer, reset_attention_mask=True, micro_batch_size=2)


def test_corpus_prepared_again_meets_no_old_index_map(tmp_path: Path, tokenizer: Any) -> None:
    made = module(str(make_corpus(tmp_path / "c", tokenizer, "old", 200)), tokenizer)
    again = module(str(make_corpus(tmp_path / "c", tokenizer, "new", 400)), tokenizer)
    assert size(again) > 1.5 * size(made)
    assert "old" not in text_of(again, tokenizer, 5)


@pytest.mark.parametrize("kept", [lambda b: b[:-40], lambda b: b[:-1] + bytes([b[-1] ^ 1])], ids=["cut", "other bytes"])
def test_damaged_index_maps_are_made_again(
    kept: Any, tmp_path: Path, prepared_corpus: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = module(str(prepared_corpus), tokenizer, index_mapping_dir=str(tmp_path))
    (map_file,) = tmp_path.glob("*/*train-shuffle_index.npy")
    map_file.write_bytes(kept(map_file.read_bytes()))
    again = module(str(prepared_corpus), tokenizer, index_mapping_dir=str(tmp_path))
    assert text_of(again, tokenizer, 20) == text_of(made, tokenizer, 20)
    assert "is being rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, False])
def test_index_maps_that_find_no_room_are_not_left_behind(
    told: bool, tmp_path: Path, prepared_corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(file: str, array: np.ndarray, **_: Any) -> None:
        """As `numpy.save` on a full disk: of large arrays it tells, without a number, and of small ones it does not."""
        with open(file, "wb") as out:
            np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
        if told:
            raise OSError(f"{array.nbytes} requested and 0 written")

    monkeypatch.setattr(np, "save", cut_short)
    maps = tmp_path / "maps"
    with pytest.raises(OSError, match="No space left on device") as error:
        module(str(prepared_corpus), tokenizer, index_mapping_dir=str(maps))
    assert str(error.value.filename).startswith(str(maps))
    assert not list(maps.iterdir())


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (None, "data.paths is not set"),
        ("nowhere/corpus", "corpus.bin: no such file; create it with `mixtral-recipes data prepare"),
        (
            [0, "embedded://squad/pretraining.jsonl", 1, "embedded://squad/pretraining.jsonl"],
            "weights must be positive",
        ),
    ],
)
def test_bad_paths(paths: Any, says: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=says):
        module(paths, tokenizer)


def test_other_refusals(tmp_path: Path, prepared_corpus: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="fewer than seq_length \\+ 1 = 100001 tokens"):
        module(str(prepared_corpus), tokenizer, seq_length=100_000)
    with pytest.raises(DataError, match="needs a tokenizer"):
        module(str(prepared_corpus), None)
    with pytest.raises(DataError, match="its sequences are already full"):
        module(str(prepared_corpus), tokenizer, packed_sequence_specs=PackedSequenceSpecs(64))

    class Small:
        eos_token_id = 2

        def __len__(self) -> int:
            return 100

    record_of(prepared_corpus).unlink()
    with pytest.raises(DataError, match="but the tokenizer has only 100 tokens"):
        module(str(prepared_corpus), Small())


def test_weights_in_nemo_spelling() -> None:
    assert split_weights(["30", "a", "70", "b"]) == (["a", "b"], [30.0, 70.0])
    assert split_weights([0.5, "a", 0.5, "b"]) == (["a", "b"], [0.5, 0.5])
    assert split_weights(["a", "b"]) == (["a", "b"], None)


def other_tokenizer(folder: Path, change: str) -> Any:
    """The embedded tokenizer with another meaning of its ids, one more token, another end, or another template."""
    shutil.copytree(resolve("embedded://mixtral_tiny"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if change == "ids":
        ordinary = sorted(number for number in vocabulary.values() if number >= 300)
        new = dict(zip(ordinary, reversed(ordinary), strict=True))
        content["model"]["vocab"] = {piece: new.get(number, number) for piece, number in vocabulary.items()}
    elif change == "token":
        content["added_tokens"].append({**content["added_tokens"][-1], "id": len(vocabulary), "content": "<|im_end|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    other = load_tokenizer(folder)
    if change == "end":
        other.eos_token = "<s>"
    if change == "template":
        other.chat_template = "{{ messages }}"
    return other


@pytest.mark.parametrize("change", ["ids", "token", "end"])
def test_a_corpus_of_another_tokenizer_is_refused(change: str, prepared_corpus: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other", change)
    with pytest.raises(
        DataError, match=r"corpus\.bin was prepared with another tokenizer \(\w{12}; this run's is \w{12}"
    ):
        corpora(str(prepared_corpus), other)
    with pytest.raises(DataError, match="another tokenizer"):  # in a folder and by either of its names as well
        corpora(str(prepared_corpus.parent), other)


def test_a_chat_template_does_not_make_it_another_tokenizer(prepared_corpus: Path, tmp_path: Path) -> None:
    assert corpora(str(prepared_corpus), other_tokenizer(tmp_path / "other", "template")) == [str(prepared_corpus)]


def test_every_token_of_a_corpus_that_says_nothing_is_looked_at(
    prepared_corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    record_of(prepared_corpus).unlink()
    assert corpora(str(prepared_corpus), other_tokenizer(tmp_path / "other", "token"))  # all its ids exist here
    tokens = np.zeros((1 << 20) + 5, np.uint16)
    tokens[-2] = 1999
    tokens.tofile(prepared_corpus.with_suffix(".bin"))
    write_index(prepared_corpus.with_suffix(".idx"), np.array([len(tokens)], np.int32), np.dtype(np.uint16))
    with pytest.raises(DataError, match=r"corpus\.bin contains token 1999, but the tokenizer has only 1999 tokens"):
        corpora(str(prepared_corpus), tokenizer)


def test_what_an_earlier_corpus_said_is_not_believed(prepared_corpus: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other", "ids")
    np.zeros(7, np.uint16).tofile(prepared_corpus.with_suffix(".bin"))  # by Megatron's own tools, at the same place
    write_index(prepared_corpus.with_suffix(".idx"), np.array([7], np.int32), np.dtype(np.uint16))
    assert corpora(str(prepared_corpus), other) == [str(prepared_corpus)]


@pytest.mark.parametrize("split", ["nan,1,1", "0,0,0", "1,-1", "1e400", "", "1,1,1,1", "1:2", "x"])
def test_shares_that_are_none(split: str) -> None:
    with pytest.raises(DataError, match=r"^data.split="):
        PreTrainingDataModule("embedded://squad/pretraining.jsonl", split=split).check_places()
