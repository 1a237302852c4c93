"""Cutting contiguous ranges into boxes, and dealing out what is written."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_recipes.checkpoints.shards import boxes, write_shares
from tests.torch_dist import window


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    first = draw(st.integers(0, math.prod(shape)))
    return shape, first, draw(st.integers(first, math.prod(shape)))


@settings(max_examples=400, deadline=None)
@given(ranges())
def test_boxes_cover_a_range_exactly(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, first, last = case
    whole = torch.arange(math.prod(shape)).view(shape)
    found = []
    cut = list(boxes(shape, first, last))
    for offsets, sizes, position in cut:
        elements = whole[window(offsets, sizes)].flatten().tolist()
        assert elements == list(range(position, position + math.prod(sizes))), "a box is not contiguous"
        found += elements
    assert found == list(range(first, last))
    assert len(cut) <= 2 * len(shape)


def test_every_piece_is_written_once_and_the_work_is_even() -> None:
    shared = [(("w", (n,), (1,)), 100) for n in range(30)]
    own = [[(("o", (rank,), (1,)), 1000)] for rank in range(3)]
    held = [shared + own[0], shared + own[1], shared + own[2], shared]
    shares = write_shares(held)
    written = [place for share in shares for place in share]
    assert len(written) == len(set(written)) == 33
    sizes = dict(place for rank in held for place in rank)
    loads = [sum(sizes[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 100
    for rank, share in enumerate(shares):
        assert share <= {place for place, _ in held[rank]}, "a rank writes what it does not hold"


def test_shares_do_not_depend_on_the_order_they_are_listed_in() -> None:
    held = [[(("a", (0,), (1,)), 5), (("b", (0,), (1,)), 7)]] * 2
    assert write_shares(held) == write_shares([list(reversed(rank)) for rank in held])
