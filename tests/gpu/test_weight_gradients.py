"""Transformer Engine's product adds to a gradient buffer what fp64 adds."""

import pytest
import torch

from mixtral_recipes.models.weight_gradients import ByTransformerEngine


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_adds_to_the_buffer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 256, dtype=torch.bfloat16, device="cuda")
    gradient = torch.randn(512, 384, dtype=torch.bfloat16, device="cuda")
    buffer = torch.randn(384, 256, device="cuda").to(dtype) * 100
    expected = buffer.double() + gradient.double().t() @ inputs.double()
    ByTransformerEngine.wgrad_gemm_accum_fp32(inputs, gradient, buffer)
    difference = (buffer.double() - expected).abs().max() / expected.abs().max()
    assert float(difference) < (1e-5 if dtype == torch.float32 else 1e-2)
