"""Transformer Engine's FP8 tensors on the CPU: real ones, with the kernel that quantizes stood in for.

The scale comes from the tensor that is quantized, as in tensorwise scaling; with delayed scaling it is the quantizer's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor


def stand_in_for_the_kernel(patch: pytest.MonkeyPatch) -> None:
    """Let Transformer Engine quantize on the CPU."""
    from transformer_engine.pytorch.tensor import float8_tensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

    def quantize(source: Tensor, quantizer: Any, into: Any = None, _noop: Any = None) -> Any:
        scale = 448.0 / source.abs().max().float().clamp(min=1e-12)
        if isinstance(quantizer, Float8Quantizer):
            scale = quantizer.scale.clone()
        data = (source.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
        if into is None:
            return Float8Tensor(
                shape=source.shape, dtype=source.dtype, data=data, fp8_scale_inv=(1 / scale).reshape(1),
                fp8_dtype=quantizer.dtype, quantizer=quantizer, device=source.device,
            )  # fmt: skip
        into._data.copy_(data)
        into._scale_inv.copy_((1 / scale).reshape(1))
        return into

    patch.setattr(float8_tensor.tex, "quantize", quantize)


def in_fp8(weight: Tensor, *, delayed: bool = False) -> torch.nn.Parameter:
    """A parameter in FP8 that keeps its first values beside, as Transformer Engine's modules make it."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.module.base import _attach_high_precision_init_val
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    quantizer: Any = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, torch.device("cpu"), columnwise=False)
    if delayed:  # a scale of 1, as long as nothing was seen
        quantizer = Float8Quantizer(torch.ones(1), torch.zeros(1), DType.kFloat8E4M3, columnwise=False)
    parameter = torch.nn.Parameter(quantizer(weight.detach()))
    _attach_high_precision_init_val(parameter, weight.detach().clone())
    return parameter
