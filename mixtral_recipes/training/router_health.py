"""How many tokens each expert gets: the first place a mixture of experts goes wrong."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RouterHealth:
    """Counts routed tokens per layer and expert, over all ranks, between two reads."""

    def __init__(self, model: list[Any], num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_layers, num_experts, device=device)
        for chunk in model:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # Without gradients it is validation, or the first pass of a recomputed layer, which comes a second time.
        if not (router.training and torch.is_grad_enabled()):
            return
        routing_map = output[1].detach().flatten(0, -2)
        padding = args[1] if len(args) > 1 else None
        if padding is not None:
            routing_map = routing_map & ~padding.reshape(-1, 1)
        self.counts[router.layer_number - 1] += routing_map.sum(0)

    def read(self) -> Tensor:
        """Tokens per layer and expert since the last read, [layers, experts], summed over ranks; starts anew.

        Every rank routes other tokens: Megatron's MoE layers need sequence parallelism under tensor parallelism.
        """
        counts = self.counts.clone()
        self.counts.zero_()
        torch.distributed.all_reduce(counts)
        return counts


def imbalance(counts: Tensor) -> float:
    """The busiest expert's load over an even share, the worst layer's; 1.0 is perfectly even."""
    share = counts.sum(1, keepdim=True).clamp(min=1) / counts.shape[1]
    return float((counts / share).max())
