"""Megatron's router, with a load-balancing loss that is right, and fits fused kernels, where sequences are padded."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron's top-k router.

    With ``calculate_per_token_loss`` Megatron multiplies the auxiliary loss by the microbatch's token count, written as
    this rank's real tokens times the number of tensor- and context-parallel ranks. With a padding mask its count is
    already the sum over those ranks (an all-reduce in place), so the loss is too large by a factor of their number.
    Of ``global_aux_loss`` each data-parallel rank has only its share, and the shares are then averaged, so the loss
    shrinks as data-parallel ranks are added. Here it is multiplied by the mean count over the tensor- and
    context-parallel ranks, and a global loss by the sum of these over data-parallel ranks: the layout changes nothing.

    That count is a float, too, if a whole one, and Transformer Engine's fused loss takes int64 only: here it gets one.
    (`models/acceleration.py` keeps the losses whose counts are not whole from that kernel.)

    Source: Megatron-Core 0.19 `moe_utils.py` get_tokens_per_expert_and_token_count; Transformer Engine 2.20
    `fused_moe_aux_loss`.
    """

    _real_tokens: int | Tensor

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron's; remembers how many tokens are real."""
        if padding_mask is None:
            self._real_tokens = logits.shape[:-1].numel()
        else:
            self._real_tokens = padding_mask.logical_not().sum()
        return super().routing(logits, padding_mask)

    def attach_and_log_load_balancing_loss(
        self, *args: Any, needs_dp_avg: bool = True, valid_token_count: Any = None, **named: Any
    ) -> Tensor:
        """As Megatron's, with the right count."""
        group = self.tp_cp_group if needs_dp_avg else self.tp_dp_cp_group  # a global loss needs no average
        count: Any = self._real_tokens
        if isinstance(count, Tensor):
            count = count.clone()
            torch.distributed.all_reduce(count, group=group)
        else:
            count *= group.size()
        return super().attach_and_log_load_balancing_loss(
            *args, needs_dp_avg=needs_dp_avg, valid_token_count=count / self.tp_cp_group.size(), **named
        )

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """As Megatron's, with a whole number of tokens."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        tokens_per_expert, here, total = get_tokens_per_expert_and_token_count(
            routing_map, self.tp_cp_group, topk=self.topk, with_padding_mask=with_padding_mask
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=total.round().long() if isinstance(total, Tensor) else total,  # pyright: ignore[reportArgumentType]
            topk=self.topk,
            num_experts=self.config.num_moe_experts,  # pyright: ignore[reportArgumentType]
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group, valid_token_count=here
        )
