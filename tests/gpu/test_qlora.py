"""A quantised base on a GPU: kernels against the plain ways, bitsandbytes' bytes, memory."""

import gc
from typing import Any

import pytest
import torch

from mixtral_recipes.peft.quantized import kernels, layers
from mixtral_recipes.peft.quantized.int8 import Int8
from mixtral_recipes.peft.quantized.nf4 import NF4
from mixtral_recipes.peft.quantized.split import Split

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_gives_what_plain_torch_does(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = kind.of(torch.randn(1000, 4096, device="cuda") * 0.02)
    fused = weight.dequantize(dtype)
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    plain = weight.dequantize(dtype)
    # The kernel may add a scale's mean in the same instruction as its product.
    torch.testing.assert_close(fused, plain, rtol=2**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_has_bitsandbytes_bytes(dtype: torch.dtype) -> None:
    """bitsandbytes is compiled with --use_fast_math: its 1 / absmax is rounded otherwise now and then.

    If it always were, two or three of these four million weights would lie on the other side of a border.
    """
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = (torch.randn(1024, 4096, device="cuda") * 0.02).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4.of(weight)
    assert (ours.codes.flatten() != codes.flatten()).sum() <= 8
    assert (ours.absmax.flatten() != state.absmax).sum() <= 8


def test_a_product_keeps_nothing() -> None:
    weight = layers.Format(4, 64).quantize(torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16), Split())
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers._Product.apply(x, weight, None)  # the first product of a process takes cuBLAS's work space, 32 MiB
    gc.collect()
    before = torch.cuda.memory_allocated()
    out = layers._Product.apply(x, weight, None)
    assert torch.cuda.memory_allocated() - before < 2 * out.nbytes + (1 << 20)
    out.sum().backward()
