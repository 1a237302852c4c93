"""Packing: exactly best-fit-decreasing, every sample once, steps of equal cost, rows that keep samples apart."""

import bisect

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.batches.packing import Balanced, PackCollate, PackedDataset, pack
from mixtral_recipes.errors import DataError


def textbook_room(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing, sample by sample: the room left in each bin, ascending."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, length)
        left = room.pop(at) if at < len(room) else capacity
        bisect.insort(room, left - length)
    return room


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 600))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=200)), capacity


@settings(max_examples=100, deadline=None)
@given(packings())
@example(([8, 6, 2], 10))  # 2 fits both bins, and belongs where it leaves nothing
def test_bins_are_those_of_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack(np.array(lengths), capacity)
    assert sorted((capacity - packs.sums(np.array(lengths))).tolist()) == textbook_room(lengths, capacity)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("capacity", [2048, 4096, 32768, 100_000])
def test_many_lengths_fill_bins_to_a_thousandth(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 200_000).astype(int), 1, capacity)
    packs = pack(lengths, capacity)
    assert packs.sums(lengths).max() <= capacity
    assert len(packs) <= 1.001 * lengths.sum() / capacity + 1


@pytest.mark.parametrize("lengths", [[5, 0], [5, 11]])
def test_lengths_outside_the_pack_are_named(lengths: list[int]) -> None:
    with pytest.raises(DataError, match=f"sample 1 has {lengths[1]} tokens; a pack can hold 1 to 10"):
        pack(np.array(lengths), 10)


def test_nothing_to_pack() -> None:
    assert len(pack(np.array([], np.int64), 10)) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=100), st.integers(1, 16), st.integers(0, 3))
def test_balanced_order_is_a_permutation_of_its_own_each_epoch(costs: list[int], window: int, epoch: int) -> None:
    order = Balanced(np.array(costs), window, seed=7)
    assert sorted(order(epoch).tolist()) == list(range(len(costs)))
    assert np.array_equal(order(epoch), order(epoch))


@pytest.mark.parametrize("window", [8, 64, 100, 7])
def test_neighbours_cost_the_same_in_steps_of_every_cost(window: int) -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 6400)
    count = 6400 // window * window
    balanced = costs[Balanced(costs, window, seed=1)(0)][:count].reshape(-1, window)
    shuffled = costs[np.random.default_rng(1).permutation(6400)][:count].reshape(-1, window)

    def spread(steps: np.ndarray) -> float:
        return float(steps.sum(1).std() / steps.sum(1).mean())

    def waste(steps: np.ndarray) -> float:
        """Time two ranks spend, over what they would if each microbatch cost the same on both."""
        pairs = steps[:, : window // 2 * 2].reshape(-1, 2)
        return float(pairs.max(1).sum() * 2 / pairs.sum()) - 1

    assert waste(balanced) < (0.05 if window % 2 == 0 else 0.4) < waste(shuffled)
    assert spread(balanced) < 2 * spread(shuffled)


def sample(first: int, length: int) -> Sample:
    return Sample(tokens=np.arange(first, first + length + 1), loss_mask=np.arange(length) >= length // 2)


def test_collated_row() -> None:
    batch = PackCollate(pad_id=0, multiple=8)([[sample(10, 3), sample(20, 2)]])
    assert batch["tokens"].tolist() == [[10, 11, 12, 20, 21, 0, 0, 0]]
    assert batch["labels"].tolist() == [[11, 12, 13, 21, 22, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert batch["padding_mask"].tolist() == [[False] * 5 + [True] * 3]


def test_sequences_are_rounded_up_for_context_parallelism() -> None:
    batch = PackCollate(pad_id=0, length=16, sequence_multiple=4)([[sample(10, 3), sample(20, 5)]])
    assert batch["cu_seqlens"].tolist() == [0, 4, 12, 16]
    assert batch["tokens"].tolist() == [[10, 11, 12, 0, 20, 21, 22, 23, 24, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["padding_mask"].sum() == 8


def test_full_rows_have_no_padding_mask() -> None:
    assert "padding_mask" not in PackCollate(pad_id=0, multiple=8)([[sample(0, 8)]])


def test_cu_seqlens_of_constant_size() -> None:
    batch = PackCollate(pad_id=0, length=8, cu_seqlens_size=6)([[sample(10, 3)]])
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 8, 8, 8]


def test_one_row_per_microbatch() -> None:
    with pytest.raises(DataError, match="micro_batch_size=1, not 2"):
        PackCollate(pad_id=0)([[sample(0, 2)], [sample(0, 2)]])


def test_packs_are_read_from_disk_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    first = PackedDataset(None, lengths, 512)
    monkeypatch.setattr("mixtral_recipes.data.batches.packing.pack", lambda *_: pytest.fail("packed again"))
    again = PackedDataset(None, lengths, 512)
    assert np.array_equal(first.packs.samples, again.packs.samples)
    assert np.array_equal(first.costs, again.costs)
