"""A rank's experts in plain PyTorch, all their products in three steps instead of one small network each.

Shape letters: t tokens of all local experts (sorted by expert), h hidden size, f expert width.
"""

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral_recipes.peft.attach import add_adapter
from mixtral_recipes.peft.grouped import around_experts
from mixtral_recipes.peft.quantized.layers import GroupedProduct, QuantizedLinear


class GroupedExperts(SequentialMLP):
    """Megatron's SequentialMLP (same parameters, names and checkpoints), computed over all experts at once.

    One expert's tokens are a slice of the input and its results are written in place into a slice of the output, so
    that nothing is split and concatenated. A linear layer with hooks (adapters, parameter gathering during
    the forward pass) has to be called, so then Megatron's own forward runs, as it does for experts unlike Mixtral's.
    On a GPU adapters are added for all experts together instead.
    """

    @functools.cached_property
    def _are_mixtrals(self) -> bool:
        """Whether each expert is a plain SwiGLU without biases, weighted by the router afterwards."""
        c = self.config
        plain = c.activation_func is F.silu and c.gated_linear_unit and c.activation_func_clamp_value is None
        return plain and not (c.add_bias_linear or c.glu_linear_offset or c.moe_apply_probs_on_input or c.fp8 or c.fp4)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the experts.

        Args:
            permuted_local_hidden_states: [t, h], expert after expert.
            tokens_per_expert: [local experts], how many rows each has.
            permuted_probs: [t], what the router gave each row.

        Returns:
            [t, h], and no bias: Mixtral's experts have none.
        """
        experts: list[Any] = list(self.local_experts)
        counts = tokens_per_expert.tolist()
        if not torch.is_grad_enabled():  # experts without a token cost as much as those with one
            used = [place for place, count in enumerate(counts) if count] or [0]
            experts, counts = [experts[place] for place in used], [counts[place] for place in used]
        linears = [(expert.linear_fc1, expert.linear_fc2) for expert in experts]
        on_gpu = permuted_local_hidden_states.is_cuda
        if not self._are_mixtrals or any(_has_to_be_called(layer, on_gpu) for pair in linears for layer in pair):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        gate_up = _grouped(permuted_local_hidden_states, counts, [fc1 for fc1, _ in linears])
        hidden = _activated(gate_up, permuted_probs.unsqueeze(-1), fused=self.config.bias_activation_fusion)
        return _grouped(hidden, counts, [fc2 for _, fc2 in linears]), None


def _has_to_be_called(layer: Any, on_gpu: bool) -> bool:
    """Whether a layer has hooks; an adapter's counts on a CPU only, where one expert's rows stay in the cache."""
    apart = (add_adapter,) if on_gpu else ()
    return bool(layer._forward_pre_hooks) or any(hook not in apart for hook in layer._forward_hooks.values())


def _grouped(x: Tensor, counts: list[int], layers: list[Any]) -> Tensor:
    """[t, in] through the layer of each row's expert, and its adapter -> [t, out]."""
    adapters, with_adapters = [getattr(layer, "adapter", None) for layer in layers], None
    if any(adapters):
        x, with_adapters = around_experts(adapters, x, counts)
    if isinstance(layers[0], QuantizedLinear):
        out = GroupedProduct.apply(x, counts, [layer.quantized for layer in layers])
    else:
        out = _GroupedLinear.apply(x, counts, *(layer.weight for layer in layers))
    return with_adapters(out) if with_adapters else out


class _GroupedLinear(torch.autograd.Function):
    """Rows of x by the expert they belong to: [t, in] x experts of [out, in] -> [t, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        of_weights = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if of_weights else None, *weights)  # frozen ones need no input
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for rows, result, weight in zip(x.split(counts), out.split(counts), weights, strict=True):
            torch.mm(rows, weight.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        for_x, _, *for_weights = ctx.needs_input_grad
        grads, grad_x = grad.contiguous().split(ctx.counts), None
        if for_x:
            grad_x = grad.new_empty(len(grad), weights[0].shape[1])
            for rows, result, weight in zip(grads, grad_x.split(ctx.counts), weights, strict=True):
                torch.mm(rows, weight, out=result)
        if x is None:
            return grad_x, None, *(None for _ in weights)
        of_weights = [
            torch.mm(rows.t(), inputs) if wanted else None
            for rows, inputs, wanted in zip(grads, x.split(ctx.counts), for_weights, strict=True)
        ]
        return grad_x, None, *of_weights


def _activated(gate_up: Tensor, probs: Tensor, *, fused: bool) -> Tensor:
    """SwiGLU times the router's probability: [t, 2 f] (gate, up) and [t, 1] -> [t, f].

    Fused, torch compiles it into one kernel each way, and only its inputs are kept. Uncompiled, as on a CPU, it is
    faster to keep what the backward pass needs again.
    """
    if fused:
        return weighted_bias_swiglu_impl(gate_up, None, probs)
    return cast(Tensor, _GatedActivation.apply(gate_up, probs))


class _GatedActivation(torch.autograd.Function):
    """SwiGLU times the router's probability, typed as the input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        product = activated * up
        ctx.save_for_backward(gate_up, activated, product, probs)
        return (product * probs).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_up, activated, product, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        of_probs = torch.linalg.vecdot(grad.to(probs.dtype), product.to(probs.dtype)).unsqueeze(-1)
        of_product = (grad * probs).to(gate_up.dtype)
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = of_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(of_product * up, gate, grad_input=of_gate)
        torch.mul(of_product, activated, out=of_up)
        return of_gate_up, of_probs
