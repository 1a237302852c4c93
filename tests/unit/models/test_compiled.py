"""Our way to write a gradient that torch compiles for the card; how many kernels it makes is tested in `tests/te`."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu

from mixtral_recipes.models import compiled
from mixtral_recipes.models.compiled import weighted_swiglu_back


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the compiler would be a C++ one."""
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled._write_gradients)


@pytest.mark.parametrize("probabilities", [torch.float64, torch.float32], ids=str)
def test_it_is_the_gradient_of_the_weighted_activation(probabilities: torch.dtype) -> None:
    torch.manual_seed(1)
    y = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 1, dtype=probabilities, requires_grad=True)
    g = torch.randn(6, 5, dtype=torch.float64)
    gate, up = y.chunk(2, -1)
    (F.silu(gate) * up * weights).backward(g)
    of_y, of_weights = weighted_swiglu_back(g, y.detach(), weights.detach())
    torch.testing.assert_close(of_y, y.grad)
    torch.testing.assert_close(of_weights, weights.grad)


def test_types_are_as_megatrons() -> None:
    y, weights = torch.randn(6, 10).bfloat16(), torch.rand(6, 1)
    g = torch.randn(6, 5).bfloat16()
    plain = fused_bias_swiglu.weighted_swiglu_back
    ours, theirs = weighted_swiglu_back(g, y, weights), getattr(plain, "__wrapped__", plain)(g, y, weights)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
