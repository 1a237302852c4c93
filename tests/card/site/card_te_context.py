"""Transformer Engine's ring attention of packed sequences on the card that is not there: halves, and their sums.

A rank has a front and a back piece of every sequence, one after the other; ``starts`` are of its own rows. Sums are
logarithms (``lse``), [heads, rows].
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from card_torch import on_cpu
from torch import Tensor


def _halves(starts: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Of each sequence: its front piece, its back piece, and where such a piece stands among pieces alone."""
    for start, end in pairwise(on_cpu(starts).tolist()):
        middle = (start + end) // 2
        yield slice(start, middle), slice(middle, end), slice(start // 2, end // 2)


def _read_half(out: Tensor, tensor: Tensor, starts: Tensor, which: int) -> None:
    rows = 1 if tensor.dim() == 4 else 0  # keys and values may be one tensor
    for *halves, place in _halves(starts):
        on_cpu(out).movedim(rows, 0)[place] = on_cpu(tensor).movedim(rows, 0)[halves[which]]


def _read_second_sums(out: Tensor, sums: Tensor, starts: Tensor, *rest: Any) -> None:
    for _, back, place in _halves(starts):
        on_cpu(out)[:, place] = on_cpu(sums)[:, back]


def _add_second_sums(out: None, sums: Tensor, step: Tensor, starts: Tensor, *rest: Any) -> None:
    for _, back, place in _halves(starts):
        on_cpu(sums)[:, back] = torch.logaddexp(on_cpu(sums)[:, back], on_cpu(step)[:, place])


def _add_output(
    result: None, out: Tensor, step: Tensor, old: Tensor, sums: Tensor, of_step: Tensor, starts: Tensor, back: bool,
    *rest: Any,
) -> None:  # fmt: skip
    pieces = [(slice(None), slice(None))]
    if back:
        pieces = [(second, place) for _, second, place in _halves(starts)]
    for rows, place in pieces:
        total = on_cpu(sums)[:, rows]
        kept, share = ((on_cpu(part) - total).exp().T[..., None] for part in (old[:, rows], of_step[:, place]))
        new = on_cpu(out)[rows].float() * kept + on_cpu(step)[place].float() * share
        on_cpu(out)[rows] = new.to(out.dtype)


def _add_gradient(out: None, grad: Tensor, step: Tensor, starts: Tensor, front: str, back: str) -> None:
    rows = 1 if grad.dim() == 4 else 0
    whole, part = on_cpu(grad).movedim(rows, 0), on_cpu(step).movedim(rows, 0)
    alone = "none" in (front, back)
    for first, second, place in _halves(starts):
        for piece, how in ((first, front), (second, back)):
            value = part[place if alone else piece]
            if how != "none":
                whole[piece] = value + whole[piece] if how == "add" else value


FILLED: dict[str, Callable[..., None]] = {
    "thd_read_half_tensor": _read_half,
    "thd_read_second_half_lse": _read_second_sums,
    "thd_second_half_lse_correction": _add_second_sums,
    "thd_out_correction": _add_output,
    "thd_grad_correction": _add_gradient,
}
