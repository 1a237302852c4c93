"""Megatron's router, with its load-balancing loss exact where padding is spread unevenly over ranks."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Megatron's top-k router.

    With ``calculate_per_token_loss`` Megatron multiplies the auxiliary loss by the microbatch's token count, which it
    takes as this rank's real tokens times the number of tensor- and context-parallel ranks. Padding stands at the end
    of sequences, so ranks hold different numbers of real tokens and would weigh the loss differently. Here all use
    the mean: without padding the number is Megatron's, with it every layout gives what one process gives.
    """

    def attach_and_log_load_balancing_loss(
        self, *args: Any, valid_token_count: int | Tensor | None = None, **named: Any
    ) -> Tensor:
        """As Megatron's; ``valid_token_count`` is a tensor where there is a padding mask."""
        ranks = self.tp_cp_group.size()
        if isinstance(valid_token_count, Tensor) and ranks > 1:
            total = valid_token_count.clone()
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
            valid_token_count = total / ranks
        return super().attach_and_log_load_balancing_loss(*args, valid_token_count=valid_token_count, **named)
