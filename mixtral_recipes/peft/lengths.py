"""Rows brought to learned lengths: what DoRA's training, its merging and an export compute alike."""

import torch
from torch import Tensor


def lengths_of(rows: Tensor) -> Tensor:
    """The length of each row of a matrix, [rows], in its dtype."""
    return rows.square().sum(1).sqrt()


def stretch(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """What brings rows to their learned lengths.

    A row of zeros has no direction to stretch and stays as it is. Its factor is 1, not 0: then B gets a gradient, as it
    does under LoRA, and the row can leave zero.

    Args:
        magnitude: The learned lengths, [rows], float32.
        lengths: The rows' own lengths, [rows], float32.

    Returns:
        [rows], float32; finite and differentiable in ``magnitude`` also where a length is zero.
    """
    none = lengths == 0
    return torch.where(none, 1.0, magnitude / lengths.masked_fill(none, 1.0))
