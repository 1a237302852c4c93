"""Megatron's linear layers over a frozen weight in 4 or 8 bits.

A product dequantises the weight, multiplies and lets it go; the backward pass dequantises it again. Kept by autograd,
the 16-bit weights of all layers would be there at once, and nothing were saved.

The layer's own ``weight`` stays as a parameter without memory (on the meta device), so that whoever asks for its shape,
dtype or place among the ranks gets the usual answer, and reading values fails.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from mixtral_recipes.peft.quantized.int8 import Int8
from mixtral_recipes.peft.quantized.nf4 import NF4
from mixtral_recipes.peft.quantized.split import Split
from mixtral_recipes.settings.peft import LoRA, QLoRA

Quantized = NF4 | Int8


@dataclass(frozen=True)
class Format:
    """What frozen weights are kept in.

    Attributes:
        bits: 4 (NF4) or 8 (int8 by row).
        block: Weights that share a scale in NF4.
    """

    bits: int
    block: int

    def quantize(self, weight: Tensor, split: Split, on: str | None = None) -> Quantized:
        """This rank's part of a matrix; all ranks that share it call this together.

        Args:
            weight: [rows, columns].
            split: Which part it is.
            on: As `NF4.of` has it.
        """
        if self.bits == 8:
            return Int8.of(weight, split=split)
        return NF4.of(weight, block=self.block, split=split, on=on)


def base_format(scheme: LoRA | None) -> Format | None:
    """What a scheme keeps the frozen weights in; None leaves them as they are."""
    return Format(scheme.bits, scheme.block_size) if isinstance(scheme, QLoRA) else None


class QuantizedLinear:
    """What makes a linear layer of Megatron's one over a quantised weight.

    Attributes:
        weight: A place without memory.
        format: What the weight is kept in.
        split: Which part of it this rank has.
        device: Where it is.
        quantized: The weight; None until it is read.
    """

    weight: nn.Parameter
    format: Format
    split: Split
    device: torch.device
    quantized: Quantized | None

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        return _product(self, input, **settings)


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """Megatron's, over a quantised weight; a random one is quantised at once, another when it is read.

    Args:
        format: What the weight is kept in.
    """

    def __init__(self, *sizes: int, config: Any, format: Format, **settings: Any) -> None:
        super().__init__(*sizes, config=config, **settings)
        # Megatron makes fc1 twice as wide as the experts: gate and up projection stand on each other.
        gated = config.gated_linear_unit and settings.get("tp_comm_buffer_name") == "fc1"
        _give_up_memory(self, format, axis=0, halves=2 if gated else 1)


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """As `QuantizedColumnParallelLinear`."""

    def __init__(self, *sizes: int, config: Any, format: Format, **settings: Any) -> None:
        super().__init__(*sizes, config=config, **settings)
        _give_up_memory(self, format, axis=1, halves=1)


def linears(format: Format) -> tuple[Any, Any]:
    """What a layer spec takes for a column-parallel and a row-parallel linear layer."""
    column = functools.partial(QuantizedColumnParallelLinear, format=format)
    return column, functools.partial(QuantizedRowParallelLinear, format=format)


def quantize_into(layer: QuantizedLinear, weight: Tensor) -> None:
    """Give a layer its weight; all tensor-parallel ranks call it together.

    Args:
        layer: The layer.
        weight: [rows, columns] of this rank, on the layer's device.
    """
    layer.quantized = layer.format.quantize(weight, layer.split)


def _give_up_memory(layer: Any, format: Format, *, axis: int, halves: int) -> None:
    weight, group = layer.weight, layer.tp_group
    layer.format, layer.device = format, weight.device
    layer.split = Split(axis, group.size(), group.rank(), halves, group)
    layer.quantized = None
    if layer.config.perform_initialization:
        quantize_into(layer, weight.detach())
    layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    layer.weight.quantized_layer = layer  # pyright: ignore[reportAttributeAccessIssue]


def _product(
    layer: Any,
    x: Tensor,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: ProcessGroup | None,
    **unused: Any,
) -> Tensor:
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp_group)
    return _Product.apply(x, layer.quantized, tp_group if allreduce_dgrad else None)


class _Product(torch.autograd.Function):
    """x W^T over a quantised W: [..., in] -> [..., out], nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized, group: ProcessGroup | None) -> Tensor:
        ctx.weight, ctx.group = weight, group
        return torch.matmul(x, weight.dequantize(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = rows.matmul(ctx.weight.dequantize(grad.dtype))
        of_x = of_x.view(*grad.shape[:-1], of_x.shape[-1])
        if ctx.group is not None:
            torch.distributed.all_reduce(of_x, group=ctx.group)
        return of_x, None, None


class GroupedProduct(torch.autograd.Function):
    """Rows of x by the expert they belong to: [t, in] x experts of quantised [out, in] -> [t, out].

    One expert's weight is there at a time, and nothing is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], weights: Sequence[Quantized]) -> Tensor:
        ctx.weights, ctx.counts = weights, counts
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for rows, result, weight in zip(x.split(counts), out.split(counts), weights, strict=True):
            torch.mm(rows, weight.dequantize(x.dtype).t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_x = grad.new_empty(grad.shape[0], ctx.weights[0].shape[1])
        parts = zip(grad.contiguous().split(ctx.counts), of_x.split(ctx.counts), ctx.weights, strict=True)
        for rows, result, weight in parts:
            torch.mm(rows, weight.dequantize(grad.dtype), out=result)
        return of_x, None, None
