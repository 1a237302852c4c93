"""Megatron's router, with a load-balancing loss that is right, and fits fused kernels, where sequences are padded."""

from typing import Any

import torch
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron's top-k router.

    With ``calculate_per_token_loss`` Megatron multiplies the auxiliary loss by the microbatch's token count, written as
    this rank's real tokens times the number of tensor- and context-parallel ranks. With a padding mask its count is
    already the sum over those ranks (an all-reduce in place), so the loss is too large by a factor of the number of
    ranks. Here it is the mean over the ranks: every layout gives what one process gives, and without padding the
    number is Megatron's own.

    Source: Megatron-Core 0.19 `moe_utils.py` get_tokens_per_expert_and_token_count.
    """

    _real_tokens: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron's; remembers how many tokens are real."""
        self._real_tokens = None
        ranks = self.tp_cp_group.size()
        if padding_mask is not None and ranks > 1:
            total = padding_mask.logical_not().sum()
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
            self._real_tokens = total / ranks
        return super().routing(logits, padding_mask)

    def attach_and_log_load_balancing_loss(self, *args: Any, valid_token_count: Any = None, **named: Any) -> Tensor:
        """As Megatron's, with the right count."""
        count = valid_token_count if self._real_tokens is None else self._real_tokens
        return super().attach_and_log_load_balancing_loss(*args, valid_token_count=count, **named)


def load_balancing_loss(*, total_num_tokens: int | Tensor, fused: bool = False, **named: Any) -> Tensor:
    """Megatron's loss, which takes a padded batch's count of tokens to its fused kernel, too.

    With a padding mask Megatron counts tokens as assignments divided by top-k: whole, but a float, and Transformer
    Engine's kernel takes int64 only. (`models/acceleration.py` keeps losses with fractional counts from the kernel.)

    Source: Megatron-Core 0.19 `moe_utils.py`; Transformer Engine 2.20 `fused_moe_aux_loss`.
    """
    if fused and isinstance(total_num_tokens, Tensor):
        total_num_tokens = total_num_tokens.round().long()
    return switch_load_balancing_loss_func(total_num_tokens=total_num_tokens, fused=fused, **named)  # pyright: ignore[reportArgumentType]


megatron_router.switch_load_balancing_loss_func = load_balancing_loss  # pyright: ignore[reportAttributeAccessIssue]
