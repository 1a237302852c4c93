"""The adapters of a rank's experts, computed together.

On a GPU two grouped products do it, so that the host launches as many kernels for eight experts as for one and waits
for none of them. On a CPU, where a product of its own for each expert is faster, they are written in place.

Shape suffixes in comments: t tokens of all experts (sorted by expert), r the adapters' dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixtral_recipes.cpu.grouped_linear import GroupedLinear
from mixtral_recipes.peft.adapter import Adapter


class GroupedAdapter(nn.Module):
    """The adapters of a layer that multiplies several experts' matrices at once (Transformer Engine's GroupedLinear).

    Each expert has its own adapter, or none, named as under the sequential experts.
    """

    def __init__(self, adapters: dict[int, Adapter]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(expert): adapter for expert, adapter in adapters.items()})

    def add_to(self, output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
        """As `add_of_experts`."""
        found: dict[str, Any] = dict(self.experts.items())
        adapters = [found.get(str(expert)) for expert in range(len(tokens_per_expert))]
        return add_of_experts(adapters, output, x, tokens_per_expert)


def add_of_experts(adapters: Sequence[Adapter | None], output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
    """The output of several experts' layers with each one's adapter.

    Args:
        adapters: Each expert's; None for one without.
        output: [t, out], expert after expert; may be written over.
        x: [t, in].
        tokens_per_expert: Rows of each expert.
    """
    first = next(adapter for adapter in adapters if adapter is not None)
    if first.dropout_position == "pre":
        x = first.dropout(x)
    # bf16 has the only kernel there is.
    add = _by_grouped_products if x.is_cuda and first.lora_a.dtype == torch.bfloat16 else _in_place
    output = add(adapters, first, output, x.to(first.lora_a.dtype), tokens_per_expert)
    factors = _factors(adapters)
    if factors is None:
        return output
    rows = torch.as_tensor(tokens_per_expert).to(x.device, non_blocking=True)
    return output * factors.to(output.dtype).repeat_interleave(rows, dim=0, output_size=len(output))


def _by_grouped_products(
    adapters: Sequence[Adapter | None], first: Adapter, output: Tensor, x: Tensor, tokens_per_expert: Any
) -> Tensor:
    rows = torch.as_tensor(tokens_per_expert, dtype=torch.int32).to(x.device, non_blocking=True)
    ends = rows.cumsum(0, dtype=torch.int32)
    a, b = (torch.stack(factors) for factors in _factors_of(adapters, first))
    missing = -a.shape[1] % 8  # the kernel wants whole 16 bytes
    if missing:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    low = _grouped_product(x, a.transpose(1, 2), offs=ends)  # [t, r]
    return _sum(first, output, _grouped_product(low, b.transpose(1, 2), offs=ends))


def _in_place(
    adapters: Sequence[Adapter | None], first: Adapter, output: Tensor, x: Tensor, tokens_per_expert: Any
) -> Tensor:
    counts = tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)
    a, b = _factors_of(adapters, first)
    low = GroupedLinear.apply(x, counts, *a)  # [t, r]
    if output.dtype == low.dtype and (first.dropout_position == "pre" or not first.dropout.p):
        return _AddProducts.apply(output, low, counts, first.scale, *b)
    return _sum(first, output, GroupedLinear.apply(low, counts, *b))


def _sum(first: Adapter, output: Tensor, added: Tensor) -> Tensor:
    if first.dropout_position == "post":
        added = first.dropout(added)
    return torch.add(output, added.to(output.dtype), alpha=first.scale)


def _factors_of(adapters: Sequence[Adapter | None], first: Adapter) -> tuple[list[Tensor], list[Tensor]]:
    """Each expert's A [r, in] and B [out, r]; zeros, which add nothing, for one without."""
    none = torch.zeros_like(first.lora_a), torch.zeros_like(first.lora_b)
    pairs = [(one.lora_a, one.lora_b) if one else none for one in adapters]
    return [a for a, _ in pairs], [b.flatten(0, -2) for _, b in pairs]


def _factors(adapters: Sequence[Adapter | None]) -> Tensor | None:
    """What each row of each expert is multiplied by, [experts, out]; None where rows keep their lengths."""
    factors = [one.factors() if one else None for one in adapters]
    known = next((each for each in factors if each is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if each is None else each for each in factors])


def _grouped_product(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """Rows of x [t, in], expert after expert up to ``offs``, by their expert's matrix of [experts, in, out]."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]  # torch below 2.10
    return product(x, weights, offs=offs)


class _AddProducts(torch.autograd.Function):
    """output [t, out] + scale * low [t, r] B^T, B [out, r] of each row's expert; written into ``output``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, counts: list[int], scale: float, *b: Tensor) -> Tensor:
        ctx.save_for_backward(low, *b)
        ctx.counts, ctx.scale = counts, scale
        ctx.mark_dirty(output)
        for result, rows, weight in zip(output.split(counts), low.split(counts), b, strict=True):
            result.addmm_(rows, weight.t(), alpha=scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        low, *b = ctx.saved_tensors
        grads, of_low = grad.split(ctx.counts), torch.empty_like(low)
        for rows, result, weight in zip(grads, of_low.split(ctx.counts), b, strict=True):
            torch.addmm(result, rows, weight, beta=0, alpha=ctx.scale, out=result)
        wanted = ctx.needs_input_grad[4:]
        of_b = [
            torch.addmm(weight, rows.t(), inputs, beta=0, alpha=ctx.scale) if one else None
            for rows, inputs, weight, one in zip(grads, low.split(ctx.counts), b, wanted, strict=True)
        ]
        return grad, of_low, None, None, *of_b
