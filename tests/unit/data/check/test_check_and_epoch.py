"""What `data check` counts is what an epoch of training then sees."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.data import recognize
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.check.check import check
from mixtral_recipes.settings.data import PackedSequenceSpecs

U, A = "user", "assistant"


def chats() -> list[dict[str, Any]]:
    """Conversations with everything in them that changes what is learned."""
    rows: list[dict[str, Any]] = []
    for n in range(60):
        turns = [
            {"role": U, "content": f"Question {n} " + "word " * (n % 40)},
            {"role": A, "content": "yes " * (n % 25 + 1)},
        ]
        turns += [{"role": U, "content": "more"}, {"role": A, "content": f"end {n}", "weight": n % 3 > 0}]
        rows.append({"messages": turns, "id": n})
    rows[7]["weight"] = 0
    rows[8]["messages"] = [{"role": U, "content": "x"}]
    return rows


def pairs() -> list[dict[str, Any]]:
    rows = [{"input": f"q {n} " + "long " * (7 * n % 70), "output": "a " * (11 * n % 50 + 1)} for n in range(60)]
    return [*rows, {"input": "no answer"}, {"input": "x", "output": "y", "train": False}]


def squad() -> list[dict[str, Any]]:
    contexts = [f"The lamp {n} is green. " + "So. " * (7 * n % 40) for n in range(20)]
    answers = [["green"] * (n % 4 > 0) for n in range(60)]
    return [
        {"context": contexts[n // 3], "question": f"Which {n}?", "answers": {"text": texts}}
        for n, texts in enumerate(answers)
    ]


@pytest.mark.parametrize("rows", [chats, pairs, squad])
@pytest.mark.parametrize("packed", [False, True])
def test_they_are_the_same_of_a_stream(tmp_path: Path, tokenizer: Any, rows: Any, packed: bool) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    found = recognize(path)
    settings = {"on_bad_record": "skip", "streaming": True, "val_proportion": 0.1}
    report = check(found, tokenizer, seq_length=48, settings=settings)
    assert not any(finding.where == "validation split" for finding in report.findings)
    specs = PackedSequenceSpecs(96) if packed else None
    module = found.module(seq_length=48, global_batch_size=1, packed_sequence_specs=specs, **settings)
    module.setup(tokenizer)
    stream = module._stream(1)
    count = sum(stream.how.count(window) for window in stream._windows(0, lambda error, record=None: None))
    batches = module.train_batches(DataParallelPlace())
    assert sum(int(next(batches)["loss_mask"].sum()) for _ in range(count)) == report.tallies["train"].learned > 0
    validation = module.validation_batches(DataParallelPlace(), limit_batches=None)
    learned = sum(int(batch["loss_mask"].sum()) for batch in (() if validation is None else validation))
    assert learned == report.tallies["validation"].learned


@pytest.mark.parametrize("rows", [chats, pairs, squad])
@pytest.mark.parametrize("truncation", ["prompt", "end", "drop"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_numbers_are_the_same(tmp_path: Path, tokenizer: Any, rows: Any, truncation: str, packed: bool) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    found = recognize(path)
    settings = {"on_bad_record": "skip", "truncation": truncation, "val_proportion": 0.1}
    report = check(found, tokenizer, seq_length=48, settings=settings)
    specs = PackedSequenceSpecs(96) if packed else None
    module = found.module(seq_length=48, global_batch_size=1, packed_sequence_specs=specs, **settings)
    module.setup(tokenizer)
    for split, tally in report.tallies.items():
        if not tally.samples:
            assert split not in module._sets
            continue
        batches = (
            module.train_batches(DataParallelPlace())
            if split == "train"
            else module.validation_batches(DataParallelPlace(), limit_batches=None)
        )
        seen = [next(batches) for _ in range(len(module.rows(split)))]
        assert sum(int(batch["loss_mask"].sum()) for batch in seen) == tally.learned > 0
        real = sum(
            int((~batch["padding_mask"]).sum()) if "padding_mask" in batch else batch["tokens"].numel()
            for batch in seen
        )
        assert real + tally.samples == tally.tokens  # a sample has one position less than tokens
        assert module._sets[split].tally == tally
    train = report.tallies["train"]
    assert sum(tally.records + tally.skipped for tally in report.tallies.values()) == len(rows())
    assert train.cut_tokens or truncation != "prompt"
    assert train.dropped or truncation == "prompt"
