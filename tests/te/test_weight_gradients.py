"""Megatron's own layers add their weights' gradients by Transformer Engine's product; a stand-in computes it here."""

import inspect
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_microbatches_add_up_in_the_buffer(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from megatron.core.tensor_parallel import layers
    from transformer_engine.pytorch import cpp_extensions  # pyright: ignore[reportMissingImports]

    from mixtral_recipes.models.acceleration import APEX
    from mixtral_recipes.models.weight_gradients import ByTransformerEngine, add_in_products

    arguments = inspect.signature(cpp_extensions.general_gemm)
    calls: list[dict[str, Any]] = []

    def product(*args: Any, **named: Any) -> None:
        """NT of A [k, m] and B [k, n] is B transposed times A: the letters are cuBLAS's, for matrices by columns."""
        given = arguments.bind(*args, **named).arguments
        calls.append(given)
        assert given["layout"] == "NT"
        assert given["out_dtype"] == given["out"].dtype == dtype
        found = given["B"].t().float() @ given["A"].float()
        given["out"].copy_(given["out"] + found if given["accumulate"] else found)

    monkeypatch.setattr(cpp_extensions, "general_gemm", product)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    add_in_products()
    assert find_spec(APEX) is None
    assert layers.fused_weight_gradient_mlp_cuda is ByTransformerEngine
    assert layers._grad_accum_fusion_available

    weight = torch.nn.Parameter(torch.randn(6, 4))
    weight.main_grad = torch.zeros(6, 4, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
    expected = torch.zeros(6, 4)
    for _ in range(2):
        inputs, outputs = torch.randn(3, 1, 4, requires_grad=True), torch.randn(3, 1, 6)
        _output(weight, inputs).backward(outputs)
        expected += outputs.view(3, 6).t() @ inputs.detach().view(3, 4)
    assert len(calls) == 2
    assert weight.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(weight.main_grad.float(), expected, rtol=tolerance, atol=tolerance)


def _output(weight: Tensor, inputs: Tensor) -> Tensor:
    """A linear layer of Megatron's that fuses; [tokens, 1, in] -> [tokens, 1, out]."""
    from megatron.core.tensor_parallel import layers

    return layers.linear_with_grad_accumulation_and_async_allreduce(
        inputs, weight, None, gradient_accumulation_fusion=True, allreduce_dgrad=False, sequence_parallel=False
    )
