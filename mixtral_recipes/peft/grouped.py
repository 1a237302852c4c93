"""The adapters of a rank's experts, computed together where experts are: on a GPU.

Grouped products do it, for which the host waits for nothing. What an adapter adds to its layer's output, and to the
gradient of the layer's input, is added where that is: either is as large as all tokens of all experts, and writing a
second one, to add the two into a third, would take more of the card's memory and time than the products.

Shape letters: t tokens of all local experts (sorted by expert), e experts, r the adapters' dim.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixtral_recipes.peft.adapter import Adapter
from mixtral_recipes.peft.names import tensor_key


class GroupedAdapter(nn.Module):
    """The adapters of a layer that multiplies several experts' matrices at once (Transformer Engine's GroupedLinear).

    Each kind of their tensors is one parameter of all experts, [adapted experts, ...], so that nothing is stacked for
    a product and no more than a parameter of each kind is reduced and updated. In a checkpoint each expert's tensors
    have the keys they have under the sequential experts.

    Args:
        adapters: By the expert's place on this rank; an expert may have none. Their parameters are taken from them.
    """

    is_expert = True
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, adapters: dict[int, Adapter]) -> None:
        super().__init__()
        self.experts = adapters  # no modules of this one: their tensors are views of its parameters
        # Of the pass under way, from before its layer computes until after: what `around_experts` returned.
        self.unfinished: Callable[[Tensor], Tensor] | None = None
        named = [dict(adapter.named_parameters(recurse=False)) for adapter in adapters.values()]
        self._shapes = {name: parameter.shape for name, parameter in named[0].items()}
        for name, one in named[0].items():
            parameter = nn.Parameter(torch.stack([parameters[name].detach() for parameters in named]))
            vars(parameter).update(vars(one))  # what Megatron is told of it
            self.register_parameter(name, parameter)
        for adapter in adapters.values():
            adapter._parameters.clear()

    def forward(self, x: Tensor, tokens_per_expert: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """As `around_experts`."""
        for name in self._shapes:
            for adapter, tensor in zip(self.experts.values(), self._each(name, getattr(self, name)), strict=True):
                vars(adapter)[name] = tensor
        adapters = [self.experts.get(expert) for expert in range(len(tokens_per_expert))]
        stacked = (self.lora_a, self.lora_b.flatten(1, -2)) if all(adapters) else None
        return around_experts(adapters, x, tokens_per_expert, stacked)

    def train(self, mode: bool = True) -> "GroupedAdapter":
        """As any module's."""
        for adapter in self.experts.values():
            adapter.train(mode)
        return super().train(mode)

    def parts(self) -> list[Adapter]:
        """As `Adapter.parts`."""
        return list(self.experts.values())

    def whole(self) -> list[Any]:
        """As `Adapter.whole`."""
        axes = next(iter(self.experts.values())).split_axes()
        return [getattr(self, name) for name, axis in axes.items() if axis is None]

    def sharded_state_dict(self) -> dict[str, ShardedTensorFactory]:
        """As `Adapter.sharded_state_dict`: of each parameter, what builds the experts' tensors of it."""
        first = next(iter(self.experts.values()))

        def build(name: str, parameter: Tensor, *unused: Any) -> dict[str, ShardedTensor]:
            pairs = zip(self.experts.values(), self._each(name, parameter), strict=True)
            return {each.key: each for each in (adapter.sharded(name, tensor) for adapter, tensor in pairs)}

        def merge(tensors: Any) -> Tensor:
            return torch.stack(list(tensors.values()))

        return {
            tensor_key(first.layer_name, name): ShardedTensorFactory(name, getattr(self, name), build, merge)
            for name in self._shapes
        }

    def _each(self, name: str, parameter: Tensor) -> tuple[Tensor, ...]:
        """One tensor of each expert's adapter."""
        return parameter.view(len(self.experts), *self._shapes[name]).unbind()


def around_experts(
    adapters: Sequence[Adapter | None],
    x: Tensor,
    tokens_per_expert: Any,
    stacked: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Several experts' adapters around the layer that computes the experts.

    Args:
        adapters: Each expert's; None for one without.
        x: [t, in], what the layer is about to get, expert after expert.
        tokens_per_expert: Rows of each expert.
        stacked: Their A [e, r, in] and B [e, out, r], where they are there already.

    Returns:
        What the layer is to be given instead, the same [t, in]; and what makes of the layer's output [t, out] that with
        the adapters. It may write over the one it is given.
    """
    first = next(adapter for adapter in adapters if adapter is not None)
    dtype = first.lora_a.dtype
    # Of a class of one's own, or an adapter that is left out for a while (`InferenceModel.without_adapters`).
    own = any(one is not None and getattr(one.add_to, "__func__", None) is not Adapter.add_to for one in adapters)
    if own or (x.is_cuda and dtype != torch.bfloat16):  # there is no other kernel
        return x, lambda output: one_by_one(adapters, output, x, tokens_per_expert)
    in_place = x.dtype == dtype and not (first.dropout.training and first.dropout.p)
    pending: _Pending | None = [] if in_place and x.requires_grad else None
    given = x if pending is None else _Given.apply(x, pending)

    def with_adapters(output: Tensor) -> Tensor:  # all that can wait until the layer's own products are under way
        counts = _on_host(tokens_per_expert)
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32).to(x.device, non_blocking=True)
        a, b = _in_whole_16_bytes(*(stacked or _stacked(adapters, first)))
        if _idle_get_rubbish(x.device):
            busy = torch.tensor(counts, device=x.device).view(-1, 1, 1) > 0
            a, b = torch.where(busy, a, 0), torch.where(busy, b, 0)
        if in_place and output.dtype == dtype:
            output = _Added.apply(output, x.detach(), a, b, first.scale, counts, ends, pending)
        else:
            output = output + _written_out(first, x, a, b, ends).to(output.dtype)
        factors = _factors(adapters)
        return output if factors is None else output * _by_row(factors.to(output.dtype), counts, ends)

    return given, with_adapters


def _written_out(first: Adapter, x: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """What adapters like ``first`` add to an output, [t, out]."""
    if first.dropout_position == "pre":
        x = first.dropout(x)
    low = _grouped_product(x.to(a.dtype), a.transpose(1, 2), offs=ends)  # [t, r]
    # Scaled while it is small: autograd would multiply a gradient as large as the output.
    added = _grouped_product(low * first.scale, b.transpose(1, 2), offs=ends)
    return first.dropout(added) if first.dropout_position == "post" else added


#: What is still to be added to the gradient of a layer's input, by functions that are given it.
type _Pending = list[Callable[[Tensor], None]]


class _Given(torch.autograd.Function):
    """The layer's input; to its gradient, once the layer has computed it, that through the adapters is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: _Pending) -> Tensor:
        ctx.pending = pending
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        while ctx.pending:
            ctx.pending.pop()(grad)
        return grad, None


class _Added(torch.autograd.Function):
    """The layer's output [t, out], changed where it is, with what its input x [t, in] adds to it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        counts: list[int],
        ends: Tensor,
        pending: _Pending | None,
    ) -> Tensor:
        low = _grouped_product(x, a.transpose(1, 2), offs=ends)  # [t, r]
        # Where a layer returns a view, autograd allows no change in place but one that it does not see.
        total = output.detach()
        _add_products(total, low, b.transpose(1, 2), counts, scale)
        ctx.save_for_backward(x, low, a, b, ends)
        ctx.scale, ctx.counts, ctx.pending = scale, counts, pending
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, low, a, b, ends), counts = ctx.saved_tensors, ctx.counts
        of_low = _grouped_product(grad, b, offs=ends) * ctx.scale
        if ctx.pending is not None:
            ctx.pending.append(lambda of_x: _add_products(of_x, of_low, a, counts))
        of_a = _grouped_product(of_low.t(), x, offs=ends)
        of_b = _grouped_product(grad.t(), low * ctx.scale, offs=ends)
        return grad, None, of_a, of_b, None, None, None, None


def _add_products(total: Tensor, rows: Tensor, matrices: Tensor, counts: list[int], scale: float = 1.0) -> None:
    """Add rows [t, k] through their expert's matrix of [e, k, n] to [t, n], rounding each sum once."""
    for into, mine, matrix in zip(total.split(counts), rows.split(counts), matrices, strict=True):
        into.addmm_(mine, matrix, alpha=scale)


def one_by_one(adapters: Sequence[Adapter | None], output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
    """What `around_experts` does, without grouped products."""
    counts = _on_host(tokens_per_expert)
    parts = zip(adapters, output.split(counts), x.split(counts), strict=True)
    return torch.cat([result if adapter is None else adapter.add_to(result, rows) for adapter, result, rows in parts])


def _on_host(tokens_per_expert: Any) -> list[int]:
    return tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)


def _by_row(factors: Tensor, counts: list[int], ends: Tensor) -> Tensor:
    """Of [e, out] each row's, [t, out].

    By a product, since the gradient of a factor, a sum over rows, is then added up in fp32.
    """
    row = torch.arange(sum(counts), device=ends.device).unsqueeze(1)
    starts = F.pad(ends[:-1], (1, 0))
    return ((row >= starts) & (row < ends)).to(factors.dtype) @ factors


def _stacked(adapters: Sequence[Adapter | None], first: Adapter) -> tuple[Tensor, Tensor]:
    """A [experts, r, in] and B [experts, out, r]; zeros, which add nothing, for an expert without."""
    none = torch.zeros_like(first.lora_a), torch.zeros_like(first.lora_b)
    pairs = [(one.lora_a, one.lora_b) if one else none for one in adapters]
    return torch.stack([a for a, _ in pairs]), torch.stack([b.flatten(0, -2) for _, b in pairs])


def _in_whole_16_bytes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with zeros that fill r up, as the kernel wants it."""
    missing = -a.shape[1] % 8
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


@functools.cache
def _idle_get_rubbish(device: torch.device) -> bool:
    """Whether the kernel's backward pass leaves what was in memory as the gradient of an expert without a token.

    On Blackwell it does, on Hopper it writes zeros. Source: pytorch issue 172439, open in January 2026.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


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
