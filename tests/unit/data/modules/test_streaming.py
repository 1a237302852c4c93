"""Streaming: nothing on disk, the same samples as from disk, and an exact position on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace
from mixtral_recipes.data.modules import streaming
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.data import PackedSequenceSpecs

GLOBAL = 8


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streaming, "WINDOW", 7)
    rows: list[dict[str, Any]] = [{"input": f"question {n}", "output": f"answer {n} " * (n % 5 + 1)} for n in range(40)]
    rows.insert(11, {"input": "no answer"})
    rows[20]["train"] = False
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def module(path: Path, **settings: Any) -> FineTuningDataModule:
    settings = {"on_bad_record": "skip", "streaming": True, "val_proportion": 0.1, **settings}
    return FineTuningDataModule(dataset_root=path, seq_length=24, global_batch_size=GLOBAL, **settings)


def rows(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The real tokens of each row, and what of them is learned."""
    found = []
    for number, tokens in enumerate(batch["tokens"]):
        real = ~batch["padding_mask"][number] if "padding_mask" in batch else tokens >= 0
        found.append((tuple(tokens[real].tolist()), tuple(batch["loss_mask"][number][real].bool().tolist())))
    return found


def steps(path: Path, tokenizer: Any, size: int, consumed: int, count: int, **settings: Any) -> list[Any]:
    data = module(path, **settings)
    data.setup(tokenizer)
    ranks = [data.train_batches(DataParallelPlace(r, size), consumed_samples=consumed) for r in range(size)]
    return [[row for n in range(GLOBAL) for row in rows(next(ranks[n % size]))] for _ in range(count)]


def test_any_stop_and_any_number_of_ranks_see_the_same(path: Path, tokenizer: Any) -> None:
    whole = steps(path, tokenizer, 1, 0, 14)  # over three epochs of 36
    for size in (1, 2, 4):
        for stop in (0, 3, 5, 11):
            assert steps(path, tokenizer, size, stop * GLOBAL, 14 - stop) == whole[stop:], (size, stop)
    assert steps(path, tokenizer, 2, 3 * GLOBAL, 4, num_workers=2) == whole[3:7]


def test_an_epoch_is_what_prepared_samples_hold(path: Path, tokenizer: Any) -> None:
    on_disk = module(path, streaming=False)
    on_disk.setup(tokenizer)
    samples = on_disk.rows("train")
    expected = sorted((tuple(s["tokens"][:-1].tolist()), tuple(map(bool, s["loss_mask"]))) for s in samples)
    stream = [row for step in steps(path, tokenizer, 1, 0, 9) for row in step]
    epochs = [stream[:36], stream[36:]]
    assert sorted(row for row in epochs[0] if any(row[1])) == expected
    assert len(expected) == 35  # the one that is not to be learned keeps its place, empty
    assert epochs[0] != epochs[1]
    streamed = module(path)
    streamed.setup(tokenizer)
    assert len(streamed._sets["validation"]) == len(on_disk._sets["validation"]) == 4  # pyright: ignore[reportArgumentType]


def test_nothing_is_written(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    steps(path, tokenizer, 1, 0, 2)
    assert not (tmp_path / "home" / "data" / "samples").exists()


def test_what_streaming_refuses(path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="does not go with packing"):
        module(path, packed_sequence_specs=PackedSequenceSpecs(64)).setup(tokenizer)
    data = module(path, on_bad_record="stop", val_proportion=0)
    data.setup(tokenizer)
    with pytest.raises(DataError, match=r"x\.jsonl:12: 'output' is missing"):
        [next(batches) for batches in [data.train_batches(DataParallelPlace())] for _ in range(30)]


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load_dataset(repo: str, config: str | None = None, **more: Any) -> Any:
        asked.append(more)
        return {"train": iter([{"input": "a", "output": "b"}])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [record.value for record in open_source("org/name", streaming=True).records("train")]
    assert asked == [{"revision": None, "streaming": True}]
