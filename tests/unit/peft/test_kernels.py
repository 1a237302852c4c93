"""The Triton kernels in Triton's interpreter, on the CPU, against the plain ways; and compiled for a GPU."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixtral_recipes.peft.quantized import kernels
from mixtral_recipes.peft.quantized.int8 import Int8
from mixtral_recipes.peft.quantized.nf4 import NF4
from mixtral_recipes.peft.quantized.split import Split

MODULE = "mixtral_recipes.peft.quantized.triton_kernels"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are interpreted if the variable is set when they are defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(MODULE, None)
    kernels._compiled.cache_clear()
    yield
    sys.modules.pop(MODULE, None)
    kernels._compiled.cache_clear()


# The interpreter rounds to bf16 towards zero, where torch and GPUs round to the nearest.
DTYPES = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block", "split"),
    [
        ((50, 192), 64, Split()),
        ((33, 96), 32, Split()),
        ((64, 96), 64, Split()),  # blocks cross rows
        ((520, 128), 64, Split(0, 2, 1, 2)),
        ((260, 256), 64, Split(1, 4, 3)),
    ],
)
def test_nf4(
    shape: tuple[int, int], block: int, split: Split, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Split, "gathered", repeated)
    weight = NF4.of(torch.randn(shape), block=block, split=split)
    out = torch.empty(weight.codes.shape[0], 2 * weight.codes.shape[1], dtype=dtype)
    weight.dequantize_fused(out)
    torch.testing.assert_close(out.view(shape), weight.dequantize(dtype), rtol=DTYPES[dtype], atol=0)


def repeated(self: Split, mine: torch.Tensor) -> torch.Tensor:
    """A whole matrix whose other ranks have larger scales, so that a wrong place is seen."""
    parts = [mine * (1 + abs(rank - self.rank)) for rank in range(self.size)]
    if self.axis == 1:
        return torch.cat(parts, dim=1)
    return torch.cat([part.unflatten(0, (self.halves, -1)) for part in parts], dim=1).flatten(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = Int8.of(torch.randn(7, 3000))
    out = torch.empty(weight.shape, dtype=dtype)
    kernels.dequantize_int8(weight.codes, weight.absmax, out)
    torch.testing.assert_close(out, weight.dequantize(dtype), rtol=DTYPES[dtype], atol=0)


@pytest.mark.parametrize(
    ("name", "pointers", "constants"),
    [
        (
            "nf4",
            {"codes": "*u8", "absmax": "*u8", "nested": "*fp32", "offset": "*fp32", "quantiles": "*fp32",
             "levels": "*fp32", "out": "*bf16"},
            {"BLOCK": 64, "BLOCKS": kernels._BLOCKS, "NESTED": 256},
        ),
        ("int8", {"codes": "*i8", "absmax": "*fp32", "out": "*bf16"}, {"COLUMNS": kernels._COLUMNS}),
    ],
    ids=["nf4", "int8"],
)  # fmt: skip
def test_they_compile_for_a_gpu(
    name: str, pointers: dict[str, str], constants: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter takes what the compiler refuses, which needs no GPU.

    A product and a sum in one are rounded once: the weights would not be those that other code computes.
    """
    triton = importlib.import_module("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module(MODULE), name)
    types = {each: pointers.get(each, "constexpr" if each in constants else "i32") for each in kernel.arg_names}
    hopper = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    source = importlib.import_module("triton.compiler").ASTSource(kernel, types, constants)
    compiled = triton.compile(source, hopper, kernels._ROUNDED)
    assert compiled.asm["cubin"]
    assert "fma." not in compiled.asm["ptx"]


def test_they_are_not_for_cpus() -> None:
    assert not kernels.usable(torch.device("cpu"))


@pytest.mark.parametrize("missing", [None, "no gcc or clang on PATH"])
def test_they_are_not_used_without_a_compiler(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "no_compiler", lambda: missing)
    kernels._triton_works.cache_clear()
    try:
        assert kernels.usable(torch.device("cuda")) is (missing is None)
    finally:
        kernels._triton_works.cache_clear()
