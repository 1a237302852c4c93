"""A run's data set, made again from what its lineage says of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.modules.mixed import MixedDataModule
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.recognise import recognize
from mixtral_recipes.data.records.record import SPLITS
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.evaluation.recorded_data import data_of, trained_on
from mixtral_recipes.settings.changes import describe
from mixtral_recipes.settings.data import PackedSequenceSpecs

PACKED = PackedSequenceSpecs(packed_sequence_size=128)


def run(data: DataModule) -> Lineage:
    return Lineage("adapter", Identity(), recipe=describe(data=data, base="a model"), code="x")


@pytest.mark.parametrize(
    "data",
    [
        SquadDataModule(dataset_root="embedded://squad", seq_length=64, no_answer="none", val_proportion=0.1),
        SquadDataModule(packed_sequence_specs=PACKED, prompt_floor=7),
        FineTuningDataModule(dataset_root="x.jsonl", columns={"input": "q"}, dataset_kwargs={"add_bos": False}),
        ChatDataModule(dataset_root="x.jsonl", chat_template="chatml", learn="last", truncation="drop"),
        PreTrainingDataModule(paths=[30.0, "a", 70.0, "b"], num_val_samples=4),
        PreTrainingDataModule(paths={"train": ["a"], "validation": ["b"]}),
        MixedDataModule(
            sources=[
                FineTuningDataModule(dataset_root="a, b.jsonl", columns={"input": "q"}),
                SquadDataModule(dataset_root="embedded://squad", no_answer="none"),
            ],
            weights=[0.7, 1e-5],
            packed_sequence_specs=PACKED,
        ),
        MixedDataModule(sources=[ChatDataModule(dataset_root=f"{n}.jsonl") for n in range(11)]),
    ],
)  # fmt: skip
def test_the_runs_own_data_is_made_again(data: DataModule) -> None:
    data.seq_length = 96
    assert data_of(run(data), None) == data


def test_other_data_is_read_with_the_runs_settings(tmp_path: Path) -> None:
    own = SquadDataModule(dataset_root="embedded://squad", seq_length=900, no_answer="none", micro_batch_size=4)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    found = data_of(run(own), "embedded://squad")
    assert found == own
    other = data_of(run(own), str(pairs))
    assert isinstance(other, FineTuningDataModule)
    assert (other.dataset_root, other.micro_batch_size, other.seq_length) == (str(pairs), 4, 900)
    mixture = MixedDataModule(sources=[FineTuningDataModule(dataset_root="x"), own], seq_length=96)
    assert data_of(run(mixture), "embedded://squad") == replace(own, seq_length=96, micro_batch_size=1)
    assert [trained_on(one, "SquadDataModule") for one in (run(own), run(mixture), None)] == [True, True, False]
    assert data_of(None, "embedded://squad") == SquadDataModule(dataset_root="embedded://squad")


@pytest.mark.parametrize(
    ("lineage", "why"), [(None, "it was not trained by a run"), (run(MixedDataModule()), "MixedDataModule")]
)
def test_what_cannot_be_told_is_asked_for(lineage: Lineage | None, why: str) -> None:
    with pytest.raises(RecipeError, match=f"{why}.*--data"):
        data_of(lineage, None)


def test_all_of_other_documents_is_there_to_judge_on_and_of_a_runs_own_its_share(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} is a number. " * 20}) + "\n" for number in range(50)))
    tokenizer = load_tokenizer("embedded://mixtral_tiny")

    def sizes(record: Lineage | None) -> dict[str, int]:
        data = data_of(record, str(file))
        data.seq_length = 32
        data.setup(tokenizer)
        return {name: len(found) for name in SPLITS if (found := data.samples(name)) is not None}

    whole = sizes(None)
    own = sizes(run(PreTrainingDataModule(paths=[str(file)], split="80,20,0")))
    assert set(whole) == {"validation"}
    assert set(own) == {"train", "validation"}
    assert own["validation"] / whole["validation"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("form", [{"input": "a b c", "output": "%s"}, {"text": "%s " * 50}])
@pytest.mark.parametrize(
    ("names", "judged"),
    [
        ("dev.jsonl", "dev"), ("test.jsonl", "test"), ("test.jsonl eval.jsonl", "eval"),
        ("train.jsonl test.jsonl", "test"), ("test.jsonl all.jsonl", "test"),
    ],
)  # fmt: skip
def test_other_data_need_not_have_a_split_to_train_on(
    tmp_path: Path, form: dict[str, str], names: str, judged: str
) -> None:
    for name in names.split():
        record = {key: value.replace("%s", Path(name).stem) for key, value in form.items()}
        (tmp_path / name).write_text((json.dumps(record) + "\n") * 30)
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    data = data_of(None, str(tmp_path))
    data.seq_length = 32
    data.setup(tokenizer)
    assert judged in tokenizer.decode(data.samples("validation")[0]["tokens"])
    if "train" not in names:
        to_train_on = type(data)(**recognize(tmp_path).kwargs)
        for refuses in (to_train_on.check_places, lambda: to_train_on.setup(tokenizer)):
            with pytest.raises(DataError, match=r"no training split \(train or training\); it has (validation|test)"):
                refuses()


def test_what_an_earlier_run_was_trained_on_is_no_other_data(tmp_path: Path) -> None:
    file, later = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for number, path in enumerate((file, later)):
        path.write_text(json.dumps({"input": f"a{number}", "output": "b"}) + "\n")
    first = run(FineTuningDataModule(dataset_root=str(file), val_proportion=0.3))
    chain = replace(run(FineTuningDataModule(dataset_root=str(later))), parents=[Parent("base", first)])
    found = data_of(chain, str(file))
    assert (found.judges, found.val_proportion) == (False, 0.3)
