"""Streaming: nothing on disk, the same samples as from disk, and an exact position on any number of ranks."""

import itertools
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
    on_disk = module(path, streaming=False, val_proportion=0)
    on_disk.setup(tokenizer)
    samples = on_disk.rows("train")
    expected = sorted((tuple(s["tokens"][:-1].tolist()), tuple(map(bool, s["loss_mask"]))) for s in samples)
    stream = [row for step in steps(path, tokenizer, 1, 0, 10, val_proportion=0) for row in step]
    epochs = [stream[:40], stream[40:]]
    assert sorted(row for row in epochs[0] if any(row[1])) == expected
    assert len(expected) == 39  # the one that is not to be learned keeps its place, empty
    assert epochs[0] != epochs[1]


def test_what_is_held_out_is_not_trained_on(path: Path, tokenizer: Any) -> None:
    data = module(path)
    data.setup(tokenizer)
    held: Any = data._sets["validation"]
    stream = {row[0] for step in steps(path, tokenizer, 1, 0, 5) for row in step}
    assert len(held) == 4
    assert not {tuple(held[n]["tokens"][:-1].tolist()) for n in range(4)} & stream


def packs(path: Path, tokenizer: Any, size: int, consumed: int, count: int, **settings: Any) -> list[Any]:
    """The packs of each step, over ranks: their tokens, what is learned and their borders."""
    data = module(path, packed_sequence_specs=PackedSequenceSpecs(48), **settings)
    data.setup(tokenizer)
    places = [DataParallelPlace(rank, size) for rank in range(size)]
    ranks = [data.train_batches(place, consumed_samples=consumed, sequence_multiple=2) for place in places]
    steps = [[next(ranks[n % size]) for n in range(GLOBAL)] for _ in range(count)]
    kept = ("tokens", "loss_mask", "cu_seqlens")
    return [[tuple(tuple(batch[name].flatten().tolist()) for name in kept) for batch in step] for step in steps]


def test_packs_go_on_exactly_on_any_number_of_ranks(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    whole = packs(path, tokenizer, 1, 0, 10)  # over several epochs, none of a whole number of steps
    kept = [*(tmp_path / "home" / "data" / "streams").iterdir()]
    assert len(kept) == 1
    for size in (1, 2, 4):
        for stop in (0, 1, 4, 9):
            assert packs(path, tokenizer, size, stop * GLOBAL, 10 - stop) == whole[stop:], (size, stop)
    kept[0].unlink()  # on another machine the windows before are packed again
    assert packs(path, tokenizer, 2, 4 * GLOBAL, 6) == whole[4:]
    assert packs(path, tokenizer, 2, 4 * GLOBAL, 6, num_workers=1) == whole[4:]


def test_an_epoch_of_packs_holds_every_sample_once(path: Path, tokenizer: Any) -> None:
    on_disk = module(path, streaming=False, val_proportion=0)
    on_disk.setup(tokenizer)
    expected = sorted(tuple(sample["tokens"][:-1].tolist()) for sample in on_disk.rows("train"))
    stream = [pack for step in packs(path, tokenizer, 1, 0, 4, val_proportion=0) for pack in step]
    samples: list[tuple[int, ...]] = []
    for tokens, mask, borders in stream:
        assert len(tokens) <= 48
        for start, end in itertools.pairwise(borders):
            learned = [n for n in range(start, end) if mask[n]]
            samples += [tokens[start : learned[-1] + 1]] if learned else []
    assert sorted(samples[: len(expected)]) == expected
    assert len(stream) * 48 < 1.5 * sum(map(len, samples))  # packed, not padded


def test_long_texts_make_short_windows(path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 1000)
    monkeypatch.setattr(streaming, "WINDOW_CHARACTERS", 100)
    data = module(path)
    data.setup(tokenizer)
    windows = list(data._stream(1)._windows(0, lambda error, record=None: None))
    sizes = [[len(e.content.prompt + e.content.answer) for e in window.examples] for window in windows]
    assert len(sizes) > 5
    assert all(sum(size[:-1]) <= 100 < sum(size) for size in sizes[:-1])


def test_nothing_is_read_through_before_the_first_row(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "broken.jsonl"
    good = [json.dumps({"input": f"question {n}", "output": "answer"}) for n in range(5000)]
    path.write_text("\n".join([*good, "broken"]))
    data = FineTuningDataModule(dataset_root=path, seq_length=24, global_batch_size=8, streaming=True, val_proportion=0)
    data.setup(tokenizer)
    assert next(data.train_batches(DataParallelPlace()))["loss_mask"].any()


def test_what_is_left_out_is_told(path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    steps(path, tokenizer, 2, 0, 14)
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1
    assert "x.jsonl:12: 'output' is missing" in told[0]


def test_nothing_is_written(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    steps(path, tokenizer, 1, 0, 2)
    assert not (tmp_path / "home" / "data" / "samples").exists()


def test_what_streaming_refuses(path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot be combined with pad_cu_seqlens"):
        module(path, packed_sequence_specs=PackedSequenceSpecs(64, pad_cu_seqlens=True)).setup(tokenizer)
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
