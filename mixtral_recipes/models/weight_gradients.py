"""What weight gradients need of Transformer Engine: a product that adds them to their buffer, and FP8 by column.

Megatron's own layers ask Apex for that product. Transformer Engine's can do it too, as it does for its own layers.
"""

import functools
from importlib.util import find_spec
from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

from mixtral_recipes.models.acceleration import APEX


class ByTransformerEngine:
    """What Megatron calls of Apex's ``fused_weight_gradient_mlp_cuda``, one function for each dtype of the buffer."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        """Add the gradient of a weight to its buffer, in the buffer's own precision.

        Args:
            inputs: The layer's inputs, [tokens, in features].
            gradient: Of its outputs, [tokens, out features].
            buffer: ``weight.main_grad``, [out features, in features], contiguous.
        """
        from transformer_engine.pytorch.cpp_extensions import general_gemm  # pyright: ignore[reportMissingImports]

        general_gemm(
            inputs,
            gradient,
            out_dtype=buffer.dtype,
            layout="NT",
            out=buffer,
            grad=True,
            accumulate=True,
            **_workspace(),
        )

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _workspace() -> dict[str, Any]:
    """Memory for the product, which older versions do not find for themselves."""
    try:
        from transformer_engine.pytorch.module.base import get_workspace  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    return {"workspace": get_workspace()}


def add_in_products() -> None:
    """Let Megatron's layers add gradients by Transformer Engine, where Apex is not installed."""
    if find_spec(APEX) is None:
        layers.fused_weight_gradient_mlp_cuda = ByTransformerEngine  # pyright: ignore[reportAttributeAccessIssue]
        layers._grad_accum_fusion_available = True


@functools.cache
def prepare_none_of_frozen_experts() -> None:
    """Let Transformer Engine's grouped layers quantise a gradient by column only if a weight is trained.

    By row it is multiplied by the weights, by column by the inputs, for the weights' gradient. Transformer Engine's
    single layers do not write what frozen weights do not need; its grouped ones always write both.

    Source: Transformer Engine 2.20 `grouped_linear.py` `_GroupedLinear.backward`, `linear.py` `_Linear.backward`.
    """
    from transformer_engine.pytorch import GroupedLinear  # pyright: ignore[reportMissingImports]

    all_of = GroupedLinear._get_quantizers

    @functools.wraps(all_of)
    def of_what_is_trained(layer: Any) -> tuple[list[Any], ...]:
        found = all_of(layer)
        trained = any(weight.requires_grad for weight in layer.parameters(recurse=False))
        for of_gradient in filter(None, found[-1]):
            of_gradient.set_usage(columnwise=trained)
        return found

    GroupedLinear._get_quantizers = of_what_is_trained
