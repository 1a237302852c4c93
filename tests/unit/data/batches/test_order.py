"""Stopping anywhere and resuming sees what the uninterrupted run sees; ranks read disjoint samples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_recipes.data.batches.batch import (
    Batch,
    DataParallelPlace,
    Shuffled,
    WithBlanks,
    in_turn,
    sample_stream,
)
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.settings.data import PackedSequenceSpecs

GLOBAL = 8


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 50),
    micro=st.sampled_from([1, 2]),
    size=st.sampled_from([1, 2, 4]),
    stop=st.integers(0, 12),
    shuffle=st.booleans(),
)
def test_stream_is_the_same_for_any_ranks_and_any_stop(
    samples: int, micro: int, size: int, stop: int, shuffle: bool
) -> None:
    order = Shuffled(samples, 3) if shuffle else in_turn(samples)

    def global_batches(size: int, consumed: int, steps: int) -> list[list[int]]:
        ranks = [
            DataParallelPlace(r, size).microbatches(sample_stream(order, samples, consumed), micro) for r in range(size)
        ]
        rows = GLOBAL // (micro * size)
        return [[x for _ in range(rows) for rank in ranks for x in next(rank)] for _ in range(steps)]

    whole = global_batches(1, 0, 16)
    assert global_batches(size, stop * GLOBAL, 16 - stop) == whole[stop:]
    flat = [x for step in whole for x in step]
    for epoch in range(len(flat) // samples):
        assert sorted(flat[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def files(folder: Path) -> None:
    rows = range(61)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"input": f"Add {i}", "output": f"{i + 1}"}) + "\n" for i in rows)
    )
    chat = (
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 9 + 1)}] for i in rows
    )
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in chat))


def modules(folder: Path) -> dict[str, DataModule]:
    shape: dict[str, Any] = {"seq_length": 64, "global_batch_size": GLOBAL, "micro_batch_size": 1, "num_workers": 0}
    packed = {"packed_sequence_specs": PackedSequenceSpecs(128)}
    return {
        "mock": MockDataModule(num_train_samples=37, **shape),
        "pretraining": PreTrainingDataModule(paths="embedded://squad/pretraining.jsonl", **shape),
        "blend": PreTrainingDataModule(
            paths=[30, "embedded://squad/pretraining.jsonl", 70, "embedded://squad/pretraining.jsonl"],
            num_train_samples=200,
            **shape,
        ),
        "pairs": FineTuningDataModule(dataset_root=folder / "pairs.jsonl", **shape),
        "chat": ChatDataModule(dataset_root=folder / "chat.jsonl", **shape),
        "squad": SquadDataModule(dataset_root="embedded://squad", **(shape | {"seq_length": 192})),
        "pairs packed": FineTuningDataModule(dataset_root=folder / "pairs.jsonl", **shape, **packed),
        "chat packed": ChatDataModule(dataset_root=folder / "chat.jsonl", **shape, **packed),
    }


NAMES = ("mock", "pretraining", "blend", "pairs", "chat", "squad", "pairs packed", "chat packed")


def steps(module: DataModule, size: int, consumed: int, count: int) -> list[list[list[int]]]:
    """Tokens of every row of each global batch, in the order of ranks and microbatches."""
    ranks: list[Iterator[Batch]] = [
        module.train_batches(DataParallelPlace(r, size), consumed_samples=consumed) for r in range(size)
    ]
    rows = GLOBAL // size
    return [[tokens(next(rank)) for _ in range(rows) for rank in ranks] for _ in range(count)]


def tokens(batch: Batch) -> list[int]:
    kept = ~batch["padding_mask"] if "padding_mask" in batch else torch.ones_like(batch["tokens"], dtype=torch.bool)
    return batch["tokens"][kept].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_sees_what_the_uninterrupted_one_sees(name: str, tmp_path: Path, tokenizer: Any) -> None:
    files(tmp_path)
    module = modules(tmp_path)[name]
    module.setup(tokenizer)
    whole = steps(module, 1, 0, 12)
    assert len({tuple(row) for step in whole[:2] for row in step}) > 4  # the rows do differ
    for size in (1, 2, 4):
        for stop in (0, 1, 5, 11):
            fresh = modules(tmp_path)[name]
            fresh.setup(tokenizer)
            assert steps(fresh, size, stop * GLOBAL, 12 - stop) == whole[stop:], (size, stop)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("pretraining", (2,)),
        ("chat packed", (2,)),
        *(pytest.param(name, (1, 2, 4), marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_loader_processes_change_nothing(name: str, sizes: tuple[int, ...], tmp_path: Path, tokenizer: Any) -> None:
    files(tmp_path)
    module = modules(tmp_path)[name]
    module.setup(tokenizer)
    whole = steps(module, 1, 0, 6)
    for size in sizes:
        for stop in (2, 5):
            fresh = modules(tmp_path)[name]
            fresh.num_workers = 2
            fresh.setup(tokenizer)
            assert steps(fresh, size, stop * GLOBAL, 6 - stop) == whole[stop:], (size, stop)


def test_validation_is_always_the_same_and_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    files(tmp_path)
    module = modules(tmp_path)["pairs"]
    module.setup(tokenizer)

    def validation(size: int) -> list[list[int]]:
        place = [module.validation_batches(DataParallelPlace(r, size), limit_batches=None) for r in range(size)]
        return [tokens(batch) for batches in zip(*place, strict=True) for batch in batches]  # pyright: ignore[reportArgumentType]

    assert validation(1) == validation(1) == validation(2)
    trained = {tuple(row) for step in steps(module, 1, 0, 16) for row in step}
    assert not trained & {tuple(row) for row in validation(1)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_validation_counts_each_record_once(tmp_path: Path, tokenizer: Any, packed: bool, size: int) -> None:
    """Whatever the global batch: what fills the last one up counts nothing."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"input": f"q {n}", "output": "a " * (n + 1)}) + "\n" for n in range(40)))
    specs = PackedSequenceSpecs(96) if packed else None
    module = FineTuningDataModule(
        dataset_root=path, seq_length=48, global_batch_size=size, packed_sequence_specs=specs, val_proportion=0.25
    )
    module.setup(tokenizer)
    found = module.validation_batches(DataParallelPlace(), limit_batches=None)
    assert found is not None
    batches = [*found]
    assert len(batches) == module.num_validation_batches(None) * size
    expected = sum(int(sample["loss_mask"].sum()) for sample in module._sets["validation"])
    assert sum(int(batch["loss_mask"].sum()) for batch in batches) == expected
    assert len({batch["tokens"].shape for batch in batches}) > 1 or packed


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (3, 1), (8, 1), (100, 5)])
def test_a_small_set_holds_one_record_out(tmp_path: Path, tokenizer: Any, count: int, held_out: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"input": f"q {n}", "output": "a"}) + "\n" for n in range(count)))
    module = FineTuningDataModule(dataset_root=path, seq_length=48)
    module.setup(tokenizer)
    assert len(module._sets.get("validation", ())) == held_out
    assert module.num_validation_batches(None) == bool(held_out)


def test_seed_and_epoch_change_the_order() -> None:
    assert not np.array_equal(Shuffled(100, 1)(0), Shuffled(100, 1)(1))
    assert not np.array_equal(Shuffled(100, 1)(0), Shuffled(100, 2)(0))


def test_blanks_have_every_mask_there_may_be() -> None:
    """One's own samples may be lists; nothing of the first is learned again, and its length stays."""
    rows = [{"tokens": [1, 2, 3], "loss_mask": mask} for mask in ([0, 1], np.array([0.0, 1.0], np.float32))]
    for row in rows:
        blank = WithBlanks([row])[1]
        assert list(blank["loss_mask"]) == [0, 0]
        assert blank["tokens"] == [1, 2, 3]
    assert [list(sample["loss_mask"]) for sample in WithBlanks([rows])[1]] == [[0, 0], [0, 0]]
