"""Products of rows by the expert they belong to, written in place: nothing is split and concatenated.

Shape letters: t tokens of all experts (sorted by expert). Faster on a CPU than torch's grouped product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupedLinear(torch.autograd.Function):
    """Rows of x by the expert they belong to: [t, in] x experts of [out, in] -> [t, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for rows, result, weight in zip(x.split(counts), out.split(counts), weights, strict=True):
            torch.mm(rows, weight.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        for_x, _, *for_weights = ctx.needs_input_grad
        grads, grad_x = grad.contiguous().split(ctx.counts), None
        if for_x:
            grad_x = torch.empty_like(x)
            for rows, result, weight in zip(grads, grad_x.split(ctx.counts), weights, strict=True):
                torch.mm(rows, weight, out=result)
        of_weights = [
            torch.mm(rows.t(), inputs) if wanted else None
            for rows, inputs, wanted in zip(grads, x.split(ctx.counts), for_weights, strict=True)
        ]
        return grad_x, None, *of_weights
