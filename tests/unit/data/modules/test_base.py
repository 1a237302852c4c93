"""What a data module of one's own may return, and what is refused before the first step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.data import cache
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.lightning import refuse_other_data
from mixtral_recipes.data.records import pairs
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.executors import preflight
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.data import PackedSequenceSpecs

SAMPLE = {"tokens": [1, 2, 3], "loss_mask": [0, 1]}


@dataclass
class Own(llm.DataModule):
    seq_length: int = 8
    sets: Any = field(default_factory=lambda: {"train": [SAMPLE] * 16})

    def datasets(self, tokenizer: Any) -> Any:
        return self.sets


def test_samples_become_batches() -> None:
    data = Own()
    data.setup(None)
    batch = next(data.train_batches(DataParallelPlace()))
    assert batch["labels"][0].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert data.num_validation_batches(None) == 0


def test_the_same_records_read_otherwise_are_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"input": "one and", "output": "two"}) + "\n")

    def read_by(release: str) -> dict[str, Any]:
        monkeypatch.setattr(cache, "code_version", lambda: release)
        data = llm.FineTuningDataModule(dataset_root=str(file), seq_length=32)
        data.setup(tokenizer)
        return data.identity()

    before = read_by("a")
    assert read_by("another that reads alike") == before
    encode_some = pairs.PairEncoder.encode_some

    def shorter(self: Any, some: Any) -> Any:
        for one in encode_some(self, some):
            yield one._replace(tokens=one.tokens[:-1], learned=one.learned[:-1])

    monkeypatch.setattr(pairs.PairEncoder, "encode_some", shorter)
    assert read_by("one that ends no answer") != before


SETS: dict[str, tuple[Any, str]] = {
    "a list": ([SAMPLE], "Own.datasets() returns a list; it must be a dict of train, validation and test."),
    "another split": ({"train": [SAMPLE], "dev": [SAMPLE]}, "returns a dict of train, dev; it must"),
    "no training": ({"validation": [SAMPLE]}, "returns a dict of validation; it must"),
    "nothing": ({"train": []}, "Own has no training samples."),
    "ids": ({"train": [[1, 2, 3]]}, "Own: sample 0 of train must be a dict with tokens (n + 1 numbers)"),
    "as many": ({"train": [SAMPLE], "validation": [{"tokens": [1], "loss_mask": [1]}]}, "sample 0 of validation must"),
}


@pytest.mark.parametrize("name", SETS)
def test_other_sets_are_refused_by_name(name: str) -> None:
    sets, says = SETS[name]
    with pytest.raises(DataError) as caught:
        Own(sets=sets).setup(None)
    assert says in str(caught.value)


def test_packing_needs_lengths() -> None:
    with pytest.raises(DataError, match=r"Own: packing needs list.lengths, the length of each sample"):
        Own(packed_sequence_specs=PackedSequenceSpecs(8)).setup(None)


def test_a_sample_that_is_too_long_says_so() -> None:
    data = Own(seq_length=1)
    data.setup(None)
    with pytest.raises(DataError, match=r"a sample has 3 tokens, but seq_length=1 allows at most 2"):
        next(data.train_batches(DataParallelPlace()))


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    class Plain(llm.DataModule):
        def __init__(self, path: str) -> None:
            super().__init__(seq_length=8)
            self.path = path

        def datasets(self, tokenizer: Any) -> Any:
            return {"train": [SAMPLE]}

    with pytest.raises(RecipeError) as caught:
        check_settings(llm.pretrain, {"data": Plain("x")})
    assert "model is not set" in str(caught.value)
    assert "data" not in str(caught.value)


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader", "_create_dataset", "_create_dataloader"])
def test_a_method_of_nemos_that_nothing_calls_is_refused(name: str) -> None:
    kind = type("Mine", (llm.FineTuningDataModule,), {name: lambda self: None})
    with pytest.raises(RecipeError, match=rf"data=Mine: has {name}\(\), which is never called in a subclass of Fine"):
        refuse_other_data(run.Config(kind))


class Prepares(llm.FineTuningDataModule):
    """As NeMo's guide has it: it writes its files the first time."""

    def __init__(self, root: Path, memmap_workers: int = 1) -> None:
        self.written = 0
        super().__init__(dataset_root=root, seq_length=32, memmap_workers=memmap_workers)

    def prepare_data(self) -> None:
        if not self.train_path.exists():
            self.written += 1
            for path in (self.train_path, self.validation_path, self.test_path):
                path.write_text('{"input": "one and one", "output": "two"}\n' * 8)
        super().prepare_data()


def test_a_subclass_may_make_its_files_itself(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for written in (1, 0):
        data = Prepares(tmp_path / "mine")
        preflight.check_places(data)  # before they are there
        data.setup(load_tokenizer("embedded://mixtral_tiny"))
        assert data.written == written
        assert len(next(data.train_batches(DataParallelPlace()))["tokens"]) == 1
        assert data.num_validation_batches(None) == 1
