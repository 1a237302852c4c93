"""Each context-parallel rank's share of a microbatch: equal work, every token once, whole sequences kept apart."""

import pytest
import torch

from mixtral_recipes.data.batches.batch import Batch
from mixtral_recipes.data.batches.context_parallel import chunk_indices, this_ranks_share
from mixtral_recipes.errors import DataError


def test_a_rank_takes_a_front_and_a_back_chunk() -> None:
    assert chunk_indices([0, 8], rank=0, size=2).tolist() == [0, 1, 6, 7]
    assert chunk_indices([0, 8], rank=1, size=2).tolist() == [2, 3, 4, 5]


def test_packed_sequences_are_cut_one_by_one() -> None:
    assert chunk_indices([0, 4, 12], rank=0, size=2).tolist() == [0, 3, 4, 5, 10, 11]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_every_token_once_and_do_equal_work(size: int) -> None:
    shares = [chunk_indices([0, 16, 48], rank, size) for rank in range(size)]
    assert torch.cat(shares).sort().values.tolist() == list(range(48))
    starts = torch.tensor([0] * 16 + [16] * 32)
    work = {int((share - starts[share] + 1).sum()) for share in shares}  # keys each query looks at
    assert len(work) == 1


def test_every_tensor_follows_the_tokens() -> None:
    tokens = torch.arange(16).view(2, 8)
    batch = Batch(tokens=tokens, labels=tokens + 1, position_ids=tokens % 8, padding_mask=tokens % 8 > 5)
    share = this_ranks_share(batch, rank=1, size=2)
    assert share["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert torch.equal(share["labels"], share["tokens"] + 1)
    assert torch.equal(share["position_ids"], share["tokens"] % 8)
    assert not share["padding_mask"].any()


def test_borders_still_count_whole_sequences() -> None:
    borders = torch.tensor([0, 4, 12], dtype=torch.int32)
    share = this_ranks_share(Batch(tokens=torch.arange(12).view(1, 12), cu_seqlens=borders), rank=0, size=2)
    assert torch.equal(share["cu_seqlens"], borders)
    assert share["tokens"].tolist() == [[0, 3, 4, 5, 10, 11]]


def test_one_rank_gets_the_batch_as_it_is() -> None:
    batch = Batch(tokens=torch.arange(6).view(1, 6))
    assert this_ranks_share(batch, rank=0, size=1) is batch


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DataError, match="6 tokens does not divide by 2 x context_parallel_size = 4"):
        chunk_indices([0, 6], rank=0, size=2)
