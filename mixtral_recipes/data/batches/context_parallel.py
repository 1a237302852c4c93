"""The share of each sequence that one context-parallel rank holds.

The later a token, the more causal attention costs. Each sequence is therefore cut into 2 * size chunks, and rank r
takes the r-th from the front and the r-th from the back: equal work for all ranks.

Source: Megatron-Core `utils.py` get_batch_on_this_cp_rank, Transformer Engine's ``thd`` partition.
"""

import itertools
from typing import cast

import torch
from torch import Tensor

from mixtral_recipes.data.batches.batch import Batch
from mixtral_recipes.errors import DataError


def chunk_indices(borders: list[int], rank: int, size: int) -> Tensor:
    """Positions of a row's tokens that a rank holds, in the order it holds them.

    Args:
        borders: Where the row's sequences begin and end, ``[0, ..., tokens]``.
        rank: Context-parallel rank.
        size: Context-parallel size.

    Returns:
        [tokens / size], int64: of each sequence in turn the rank's front chunk, then its back chunk.

    Raises:
        DataError: a sequence does not divide into 2 * size chunks.
    """
    chunks = []
    for start, end in itertools.pairwise(borders):
        length, rest = divmod(end - start, 2 * size)
        if rest:
            raise DataError(
                f"a sequence of {end - start} tokens does not divide by 2 x context_parallel_size = {2 * size}; pad "
                "each sequence to a multiple of it."
            )
        for number in (rank, 2 * size - 1 - rank):
            chunks.append(torch.arange(start + number * length, start + (number + 1) * length))
    return torch.cat(chunks)


def this_ranks_share(batch: Batch, rank: int, size: int) -> Batch:
    """Cut a microbatch down to the tokens of one context-parallel rank.

    Args:
        batch: Whole sequences, padded or packed.
        rank: Context-parallel rank.
        size: Context-parallel size; 1 returns the batch as it is.

    Returns:
        Every [b, s] tensor as [b, s / size]; ``cu_seqlens`` still counts whole sequences, as Megatron and
        Transformer Engine expect.
    """
    if size == 1:
        return batch
    packed = batch.get("cu_seqlens")
    borders = packed.tolist() if packed is not None else [0, batch["tokens"].shape[1]]
    mine = chunk_indices(borders, rank, size).to(batch["tokens"].device)
    tensors = cast(dict[str, Tensor], batch)
    share = {name: value if name == "cu_seqlens" else value[:, mine] for name, value in tensors.items()}
    return cast(Batch, share)
