"""What Megatron's layers do at inference, without what they do for training only.

A token of a small model costs little more than the calls that lead to it; these leave most of them out. They hold what
Megatron's classes hold and compute the same; outside of `torch.inference_mode` they are Megatron's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_layer import TransformerLayer as MegatronLayer
from torch import Tensor

from mixtral_recipes.models.cached_attention import KeyValueCache
from mixtral_recipes.models.token_dispatcher import OneRankDispatcher


class TransformerLayer(MegatronLayer):
    """Megatron's layer; with a `KeyValueCache`, only what a Mixtral has of it: two norms, attention and experts."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """As Megatron's."""
        cache = named.get("inference_context")
        if not isinstance(cache, KeyValueCache):
            return super().forward(*args, **named)
        parts: Any = self
        hidden = args[0] if args else named["hidden_states"]
        attended, _ = parts.self_attention(
            parts.input_layernorm(hidden), None, inference_context=cache, rotary_pos_emb=named["rotary_pos_emb"]
        )
        hidden = hidden + attended
        added, _ = parts.mlp(parts.pre_mlp_layernorm(hidden))
        return hidden + added, None


def _is_product(linear: Any) -> bool:
    """Whether a parallel layer is nothing but a product now."""
    return torch.is_inference_mode_enabled() and linear.tp_group.size() == 1 and linear.bias is None


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """Megatron's; at inference without tensor parallelism it is a product."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **named: Any) -> Any:
        """As Megatron's."""
        if not _is_product(self):
            return super().forward(input_, weight, *args, **named)
        used: Any = self.weight if weight is None else weight
        return F.linear(input_, used), None


class RowParallelLinear(layers.RowParallelLinear):
    """Megatron's; at inference without tensor parallelism it is a product."""

    def forward(self, input_: Tensor) -> Any:
        """As Megatron's."""
        if not _is_product(self):
            return super().forward(input_)
        return F.linear(input_, self.weight), None


class MoELayer(moe_layer.MoELayer):
    """Megatron's layer of experts; at inference, where all experts are on this rank, tokens are not dispatched."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.token_dispatcher = OneRankDispatcher.instead_of(self.token_dispatcher)
        c = self.config
        together = c.expert_model_parallel_size == 1 and c.tensor_model_parallel_size == 1
        mixtrals = c.moe_router_score_function == "softmax" and not (
            c.moe_router_pre_softmax or c.moe_router_enable_expert_bias or c.moe_router_topk_scaling_factor
            or c.moe_router_num_groups or c.moe_expert_capacity_factor or c.moe_input_jitter_eps or c.fp8
            or self.use_shared_expert
        )  # fmt: skip
        self._direct = together and mixtrals

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        if not (self._direct and torch.is_inference_mode_enabled()):
            return super().forward(hidden_states, *args, **named)
        parts: Any = self
        router, experts = parts.router, self.config.moe_router_topk
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        likeliest, chosen = router.gating(tokens).topk(experts, dim=-1)
        weights = likeliest.softmax(-1, dtype=torch.float32)
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # tokens by expert
        counts = chosen.bincount(minlength=self.config.num_moe_experts)
        out, _ = parts.experts(tokens[order // experts], counts, weights.flatten()[order])
        return out[order.argsort()].view(-1, experts, out.shape[-1]).sum(1).view_as(hidden_states), None
