"""What torch compiles of Megatron's, written so that each tensor is read once."""

import functools
from collections.abc import Callable

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor


def compile_for_memory() -> None:
    """Have the gradient of the experts' weighted SwiGLU computed by one kernel.

    Of Megatron's, torch makes two: one writes the gradients of gate and up, and evaluates both for every element of
    either, since they are concatenated; the other reads all of it again, for the gradient of the probability.
    """
    fused_bias_swiglu.weighted_swiglu_back = weighted_swiglu_back


def weighted_swiglu_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``silu(gate) * up * weights``, of the same name as Megatron's function.

    Args:
        g: Of the result, [t, f].
        y: Gate and up side by side, [t, 2 f].
        weights: The router's probabilities, [t, 1]; may be wider than the others.

    Returns:
        Of y, and of weights, each typed as it.
    """
    of_y = y.new_empty(y.shape)
    return of_y, _compiled()(g, y, weights, *of_y.chunk(2, dim=-1))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_write_gradients)


def _write_gradients(g: Tensor, y: Tensor, weights: Tensor, of_gate: Tensor, of_up: Tensor) -> Tensor:
    """Write those of gate and up into places of their own, which all go over the same elements with the sum."""
    assert of_gate.stride() == (y.shape[1], 1)  # known to the kernel, which then stores many at once
    gate, up = y.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    activated = gate * share
    of_product = g * weights
    of_gate.copy_(of_product * up * share * (1 + gate * (1 - share)))
    of_up.copy_(of_product * activated)
    return (activated * up * g.to(weights.dtype)).sum(-1, keepdim=True).to(weights.dtype)
