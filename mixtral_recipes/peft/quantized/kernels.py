"""Dequantisation on a GPU in one pass: codes are read once and 16-bit weights written once (Triton).

The plain ways (`nf4.py`, `int8.py`) read and write what is fp32 on the way. Triton comes with torch on Linux; where it,
or the C compiler it calls, is missing they run on the GPU too.
"""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.system.machine import no_compiler

_BLOCKS = 32  # blocks of weights that a program does
_COLUMNS = 2048  # weights of a row that a program does
_ROUNDED = {"enable_fp_fusion": False}  # after each product, as the plain ways are, whatever Triton's own default


def usable(device: torch.device) -> bool:
    """Whether tensors on a device are dequantised here."""
    return device.type == "cuda" and _triton_works()


@functools.cache
def _triton_works() -> bool:
    return importlib.util.find_spec("triton") is not None and no_compiler() is None


def dequantize_nf4(
    parts: Mapping[str, Tensor],
    quantiles: Tensor,
    levels: Tensor,
    place: tuple[int, int, int, int, int],
    nested: int,
    out: Tensor,
) -> None:
    """Write a matrix's values.

    Args:
        parts: `NF4.tensors`.
        quantiles: [16] float32, what a weight's code stands for.
        levels: [256] float32, what a scale's code stands for.
        place: Where its blocks are among the whole matrix's (`Split.place`).
        nested: Scales that share one.
        out: [rows, columns] (or the blocks of a row on rows of their own), contiguous; bf16, fp16 or fp32.
    """
    rows, blocks = parts["absmax"].shape
    total = rows * blocks
    _compiled().nf4[(-(-total // _BLOCKS),)](
        *(parts[name] for name in ("codes", "absmax", "nested", "offset")),
        quantiles,
        levels,
        out,
        total,
        blocks,
        *place,
        BLOCK=out.numel() // total,
        BLOCKS=_BLOCKS,
        NESTED=nested,
        **_ROUNDED,
    )


def dequantize_int8(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Write a matrix's values.

    Args:
        codes: [rows, columns] int8.
        absmax: [rows] float32.
        out: [rows, columns], contiguous; bf16, fp16 or fp32.
    """
    rows, columns = codes.shape
    _compiled().int8[(rows, -(-columns // _COLUMNS))](codes, absmax, out, columns, COLUMNS=_COLUMNS, **_ROUNDED)


@functools.lru_cache(maxsize=1)
def _compiled() -> Any:
    """The kernels' module, which needs Triton to be imported."""
    return importlib.import_module("mixtral_recipes.peft.quantized.triton_kernels")
