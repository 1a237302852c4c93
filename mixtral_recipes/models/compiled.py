"""What torch compiles of Megatron's, written so that each tensor is read once."""

import functools
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor

# Up to so many tensors are concatenated by a kernel that computes all of them, masked, for each element it writes.
_COMPUTED_IN_THE_KERNEL = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")


@functools.cache
def compile_for_memory() -> None:
    """Have the gradient of the experts' weighted SwiGLU computed by one kernel.

    Of Megatron's, torch makes two: one writes the gradient of gate and up side by side, and evaluates both for every
    element of either; the other reads all of it again, for the gradient of the router's probability. Told to write each
    half for itself, torch finds that all three go over the same elements.
    """
    from torch._inductor import config

    apart: dict[str, Any] = {name: 0 for name in _COMPUTED_IN_THE_KERNEL if hasattr(config, name)}
    fused_bias_swiglu.weighted_swiglu_back = torch.compile(weighted_swiglu_back, options=apart)


def weighted_swiglu_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``silu(gate) * up * weights``, of the same name as Megatron's function.

    Args:
        g: Of the result, [t, f].
        y: Gate and up side by side, [t, 2 f].
        weights: The router's probabilities, [t, 1]; may be wider than the others.

    Returns:
        Of y, and of weights, each typed as it.
    """
    gate, up = y.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    activated = gate * share
    of_product = g * weights
    of_gate, of_up = of_product * up * share * (1 + gate * (1 - share)), of_product * activated
    # Typed before they are joined: what is joined has been written by then.
    of_y = torch.cat([of_gate.to(y.dtype), of_up.to(y.dtype)], dim=-1)
    of_weights = (activated * up * g.to(weights.dtype)).sum(-1, keepdim=True)
    return of_y, of_weights.to(weights.dtype)
