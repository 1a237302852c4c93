"""Several sources in one stream: their shares hold, and any stop and any number of ranks see the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace
from mixtral_recipes.data.batches.mixture import Mixture
from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.modules.mixed import MixedDataModule
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.recognise import shares
from mixtral_recipes.errors import DataError
from mixtral_recipes.evaluation.samples import held_out
from mixtral_recipes.settings.data import PackedSequenceSpecs

GLOBAL = 8
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(sizes=sizes, data=st.data())
def test_shares_hold_in_every_stretch(sizes: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])) for _ in sizes]
    order = Mixture(tuple(sizes), tuple(weights), 1)
    rows = np.concatenate([order(epoch) for epoch in range(3)])
    borders = np.cumsum([0, *sizes])
    source = np.searchsorted(borders, rows, side="right") - 1
    counts = order.counts()
    assert counts.sum() == sum(sizes)
    for number, size in enumerate(sizes):
        taken = rows[source == number]
        assert len(taken) == 3 * counts[number]
        for start in range(0, len(taken) - size + 1, size):  # each of its own epochs has every row once
            assert sorted(taken[start : start + size]) == list(range(borders[number], borders[number + 1]))
        so_far = np.cumsum(source[: sum(sizes)] == number)
        expected = (np.arange(sum(sizes)) + 1) * counts[number] / sum(sizes)
        assert np.all(np.abs(so_far - expected) <= len(sizes))


def mixed(folder: Path, *, packed: bool = False) -> MixedDataModule:
    turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "it"}]
    rows = {
        "pairs": [{"input": f"question {n}", "output": f"answer {n}"} for n in range(23)],
        "chat": [{"messages": [{**turns[0], "content": f"Say {n}"}, turns[1]]} for n in range(40)],
        "squad": [{"context": f"c {n}", "question": f"why {n}?", "answers": {"text": ["so"]}} for n in range(9)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return MixedDataModule(
        sources=[
            FineTuningDataModule(dataset_root=folder / "pairs.jsonl"),
            ChatDataModule(dataset_root=folder / "chat.jsonl"),
            SquadDataModule(dataset_root=folder / "squad.jsonl"),
        ],
        weights=[0.5, 0.3, 0.2],
        seq_length=48,
        global_batch_size=GLOBAL,
        packed_sequence_specs=PackedSequenceSpecs(96) if packed else None,
    )


def content(batch: Batch) -> list[Any]:
    return [batch["tokens"].tolist(), batch["loss_mask"].tolist(), batch["sources"].tolist()]


@pytest.mark.parametrize("packed", [False, True])
def test_three_sources_resume_exactly_on_1_2_and_4_ranks(tmp_path: Path, tokenizer: Any, packed: bool) -> None:
    def steps(size: int, consumed: int, count: int) -> list[Any]:
        module = mixed(tmp_path, packed=packed)
        module.setup(tokenizer)
        ranks = [module.train_batches(DataParallelPlace(r, size), consumed_samples=consumed) for r in range(size)]
        return [[content(next(ranks[n % size])) for n in range(GLOBAL)] for _ in range(count)]

    whole = steps(1, 0, 12)
    for size in (1, 2, 4):
        for stop in (0, 5, 11):
            assert steps(size, stop * GLOBAL, 12 - stop) == whole[stop:], (size, stop)


def test_each_token_has_its_source(tmp_path: Path, tokenizer: Any) -> None:
    module = mixed(tmp_path)
    module.setup(tokenizer)
    assert module.source_names == ["pairs", "chat", "squad"]
    batches = module.train_batches(DataParallelPlace())
    seen = np.zeros(3)
    for _ in range(100):
        batch = next(batches)
        text = tokenizer.decode(batch["tokens"][0])
        expected = 0 if "question" in text else 1 if "[INST]" in text else 2
        assert batch["sources"].shape == (*batch["tokens"].shape, 3)
        assert batch["sources"][0].all(0).tolist() == [n == expected for n in range(3)]
        seen[expected] += 1
    assert np.abs(seen / 100 - [0.5, 0.3, 0.2]).max() < 0.02
    found = module.validation_batches(DataParallelPlace(), limit_batches=None)
    assert found is not None
    validation = [*found]
    learned = sum(int(sample["loss_mask"].sum()) for m in module._parts for sample in m._sets["validation"])
    assert sum(int(batch["loss_mask"].sum()) for batch in validation) == learned


def test_what_cannot_be_mixed(tmp_path: Path, tokenizer: Any) -> None:
    for change, says in (
        ({"sources": []}, "data.sources is empty"),
        ({"weights": [1.0]}, "must have one positive number for each"),
        ({"weights": [1.0, -1.0, 1.0]}, "must have one positive number for each"),
        ({"sources": [MockDataModule()] * 3}, "MockDataModule cannot be mixed"),
    ):
        module = mixed(tmp_path)
        for name, value in change.items():
            setattr(module, name, value)
        with pytest.raises(DataError, match=says):
            module.setup(tokenizer)


def test_shares_are_written_behind_the_name(tmp_path: Path) -> None:
    assert shares(["a.jsonl:0.7", "org/name:config:3"]) == (["a.jsonl", "org/name:config"], [0.7, 3.0])
    assert shares(["a.jsonl", "org/name:config"]) == (["a.jsonl", "org/name:config"], None)
    assert shares(["embedded://squad:1", "hf://org/name:3"]) == (["embedded://squad", "hf://org/name"], [1.0, 3.0])
    (tmp_path / "a:1").touch()
    assert shares([f"{tmp_path}/a:1"]) == ([f"{tmp_path}/a:1"], None)
    with pytest.raises(DataError, match="b: has no share, but others do"):
        shares(["a:1", "b"])
    with pytest.raises(DataError, match="a share must be more than 0"):
        shares(["a:0", "b:1"])


def test_each_source_has_a_held_out_question(tmp_path: Path, tokenizer: Any) -> None:
    module = mixed(tmp_path)
    module.setup(tokenizer)
    found = held_out(module, tokenizer)
    assert [one.question.split()[0] for one in found] == ["question", "[INST]", "Context:"]
