"""Pairs: what is learned, what is cut, what is refused, and what is read only once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_recipes.data.batches import samples
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.records.pairs import Pair, PairEncoder, PairTemplate
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.data import PackedSequenceSpecs


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(tokenizer: Any, sample: Any) -> tuple[str, str]:
    tokens = np.asarray(sample["tokens"])
    return tokenizer.decode(tokens), tokenizer.decode(tokens[1:][np.asarray(sample["loss_mask"], bool)])


def test_the_answer_and_eos_are_learned(tokenizer: Any) -> None:
    (encoded,) = PairEncoder(tokenizer).encode_some([(Pair("Question: who? Answer:", " Ashby Farm"), "")])
    learned = [token for token, is_learned in zip(encoded.tokens, encoded.learned, strict=True) if is_learned]
    assert tokenizer.decode(learned) == " Ashby Farm</s>"
    assert tokenizer.decode(encoded.tokens) == "<s>Question: who? Answer: Ashby Farm</s>"


def test_a_special_token_in_a_text_is_text(tokenizer: Any) -> None:
    (encoded,) = PairEncoder(tokenizer).encode_some([(Pair("a </s> b", " c <s>"), "")])
    assert encoded.tokens.count(tokenizer.eos_token_id) == encoded.tokens.count(tokenizer.bos_token_id) == 1


def test_tokenizers_without_offsets_find_the_same_answer(tokenizer: Any) -> None:
    class Slow:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        encode = staticmethod(tokenizer.encode)

    pairs = [(Pair("Question: who? Answer:", " Ashby Farm"), ""), (Pair("x", "y"), ""), (Pair("", " z"), "")]
    assert list(PairEncoder(Slow()).encode_some(pairs)) == list(PairEncoder(tokenizer).encode_some(pairs))


def test_columns_and_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"q": "Who?", "hint": "a farm", "best": "Ashby"}] * 4)
    module = FineTuningDataModule(
        dataset_root=path,
        prompt_template="Q: {question} ({hint})\nA: {output}",
        columns={"question": "q", "output": "best"},
        val_proportion=0,
        seq_length=64,
    )
    module.setup(tokenizer)
    assert texts(tokenizer, module._sets["train"][0]) == ("<s>Q: Who? (a farm)\nA: Ashby</s>", " Ashby</s>")


def test_nemo_dataset_kwargs(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"input": "a b", "answer": "c"}] * 4)
    kwargs = {
        "prompt_template": "{input}: {answer}",
        "label_key": "answer",
        "answer_only_loss": False,
        "add_eos": False,
    }
    module = FineTuningDataModule(dataset_root=path, dataset_kwargs=kwargs, val_proportion=0, seq_length=64)
    module.setup(tokenizer)
    assert texts(tokenizer, module._sets["train"][0]) == ("<s>a b: c", "a b: c")


@pytest.mark.parametrize("template", ["{input}", "{output} {input}", "{input} {output}."])
def test_a_template_ends_with_the_answer(template: str) -> None:
    with pytest.raises(DataError, match=r"must end with the answer's field, \{output\}"):
        PairTemplate(template)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input": "a"}, "'output' is missing"),
        ({"input": "a", "output": None}, "'output' is missing"),
        ({"input": "a", "output": 5}, "'output' is int, not text"),
        ({"input": "a", "output": " "}, "'output' is empty"),
        ({"input": ["a"], "output": "b"}, "'input' is list, not text"),
        ({"input": "a\ud83d", "output": "b"}, r"'input' contains half of a UTF-16 pair (\ud83d)"),
    ],
)
def test_bad_records_say_what_and_where(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        PairTemplate().pair(Record(row, "x.jsonl:7"))
    assert str(caught.value) == f"x.jsonl:7: {says}."


def test_bad_records_stop_the_run_before_it_starts_or_are_left_out(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": "a", "output": "b"}] * 9 + [{"input": "a"}] + [{"input": "a", "output": "b"}]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl:10: 'output' is missing"):
        FineTuningDataModule(dataset_root=path, seq_length=64).setup(tokenizer)
    module = FineTuningDataModule(dataset_root=path, seq_length=64, val_proportion=0, on_bad_record="skip")
    module.setup(tokenizer)
    assert len(module._sets["train"]) == 10  # pyright: ignore[reportArgumentType]
    told = capsys.readouterr().err
    assert "1 record(s) skipped, see " in told
    (kept,) = Path(told.strip().rpartition("see ")[2]).read_text().splitlines()
    assert json.loads(kept) == {"why": f"{path}:10: 'output' is missing.", "record": {"input": "a"}}
    with pytest.raises(DataError, match="must be 'stop' or 'skip'"):
        FineTuningDataModule(dataset_root=write(path, rows[:3]), on_bad_record="ignore").setup(tokenizer)


def test_long_prompts_lose_their_start(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input": "long " * 100 + "Answer:", "output": "Ashby"}, {"input": "a", "output": "long " * 100}]
    module = FineTuningDataModule(dataset_root=write(tmp_path / "x.jsonl", rows), seq_length=16, val_proportion=0)
    module.setup(tokenizer)
    whole, learned = texts(tokenizer, module._sets["train"][0])
    assert whole.startswith("<s>")
    assert whole.endswith("Answer: Ashby</s>")
    assert learned == " Ashby</s>"
    assert "cut to seq_length=16: 1 prompt(s) at the start, 1 answer(s) at the end" in capsys.readouterr().err


def test_samples_are_tokenized_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl", [{"input": "a", "output": "b"}] * 30)
    FineTuningDataModule(dataset_root=path, seq_length=64).setup(tokenizer)
    write_store = samples.write_store
    monkeypatch.setattr(samples, "write_store", lambda *_: pytest.fail("tokenized again"))
    path.rename(tmp_path / "elsewhere.jsonl")  # what counts is the content
    FineTuningDataModule(dataset_root=tmp_path / "elsewhere.jsonl", seq_length=64).setup(tokenizer)
    monkeypatch.setattr(samples, "write_store", write_store)
    module = FineTuningDataModule(dataset_root=write(path, [{"input": "a", "output": "c"}] * 30), seq_length=64)
    module.setup(tokenizer)
    assert texts(tokenizer, module._sets["train"][0])[1] == " c</s>"


def test_a_preparation_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"input": "a", "output": "b"}] * 3 + [{}])
    with pytest.raises(DataError):
        FineTuningDataModule(dataset_root=path, seq_length=64).setup(tokenizer)
    assert list((tmp_path / "home" / "data" / "samples").iterdir()) == []


def test_padded_and_packed_batches_hold_the_same_learned_tokens(tokenizer: Any) -> None:
    def learned(module: SquadDataModule, rows: int) -> list[int]:
        module.setup(tokenizer)
        batches = module.train_batches(DataParallelPlace())
        found: list[int] = []
        for _ in range(rows):
            batch = next(batches)
            found += batch["labels"][batch["loss_mask"].bool()].tolist()
        return sorted(found)

    padded = SquadDataModule(dataset_root="embedded://squad/validation.json", seq_length=192)
    packed = SquadDataModule(
        dataset_root="embedded://squad/validation.json", seq_length=192, packed_sequence_specs=PackedSequenceSpecs(512)
    )
    for module in (padded, packed):
        module.setup(tokenizer)
    assert learned(padded, len(padded.rows("train"))) == learned(packed, len(packed.rows("train")))


def test_a_module_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match="SquadDataModule needs a tokenizer"):
        SquadDataModule(dataset_root="embedded://squad").setup(None)
