"""How many tokens each expert gets, which is where a mixture of experts goes wrong first."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

# A layer has collapsed when its experts' loads are this far from even; over a window of this many tokens per expert.
LEAST_ENTROPY = 0.7
LEAST_SHARE = 0.02
TOKENS_PER_EXPERT = 200


@dataclass(frozen=True)
class Routing:
    """Where the tokens of some steps went, over all ranks.

    Attributes:
        load: Tokens each expert took, [layers, experts].
        dropped: Tokens no expert had room for, counted once per choice, [layers].
    """

    load: Tensor
    dropped: Tensor

    def __add__(self, other: "Routing") -> "Routing":
        return Routing(self.load + other.load, self.dropped + other.dropped)

    @property
    def imbalance(self) -> float:
        """The busiest expert's load over an even share, the worst layer's; 1.0 is perfectly even."""
        share = self.load.sum(1, keepdim=True).clamp(min=1) / self.load.shape[1]
        return float((self.load / share).max())

    @property
    def entropy(self) -> Tensor:
        """Entropy of each layer's load, [layers], 1.0 where it is even and 0.0 where one expert takes all."""
        share = self.load / self.load.sum(1, keepdim=True).clamp(min=1)
        bits = -(share * share.clamp(min=1e-12).log()).sum(1)
        return bits / math.log(max(2, self.load.shape[1]))

    @property
    def dropped_share(self) -> float:
        """Share of all choices that were dropped."""
        dropped = float(self.dropped.sum())
        return dropped / max(1.0, dropped + float(self.load.sum()))


class RouterHealth:
    """Counts routed tokens per layer and expert, over all ranks, between two reads."""

    def __init__(self, model: list[Any], num_layers: int, num_experts: int, device: torch.device) -> None:
        # One column more than experts: the tokens that were dropped.
        self._counts = torch.zeros(num_layers, num_experts + 1, device=device)
        self._hooks = [
            module.register_forward_hook(self._count)
            for chunk in model
            for module in chunk.modules()
            if isinstance(module, TopKRouter)
        ]

    def _count(self, router: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # Without gradients it is validation, or the first pass of a recomputed layer, which comes a second time.
        if not (router.training and torch.is_grad_enabled()):
            return
        routing_map = output[1].detach().flatten(0, -2)
        padding = args[1] if len(args) > 1 else None
        tokens = routing_map.shape[0]
        if padding is not None:
            real = ~padding.reshape(-1, 1)
            routing_map = routing_map & real
            tokens = real.sum()
        counts = self._counts[router.layer_number - 1]
        load = routing_map.sum(0)
        counts[:-1] += load
        counts[-1] += tokens * router.topk - load.sum()

    def read(self) -> Routing:
        """What was routed since the last read, summed over ranks; resets the counts.

        Every rank routes other tokens: Megatron's MoE layers need sequence parallelism under tensor parallelism.
        """
        counts = self._counts.clone()
        self._counts.zero_()
        torch.distributed.all_reduce(counts)
        counts = counts.cpu()  # once: everything that looks at them would wait for the device
        return Routing(counts[:, :-1], counts[:, -1])

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()


class CollapseWatch:
    """Warns once per layer when its router sends nearly all tokens to few experts, and again after it recovered."""

    def __init__(self) -> None:
        self._window: Routing | None = None
        self._warned: set[int] = set()

    def look(self, routing: Routing) -> list[str]:
        """Add one step; a warning per layer that has collapsed since the last full window.

        Args:
            routing: As `RouterHealth.read` gives it.
        """
        self._window = routing if self._window is None else self._window + routing
        experts = self._window.load.shape[1]
        if float(self._window.load.sum(1).min()) < TOKENS_PER_EXPERT * experts:
            return []
        window, self._window = self._window, None
        entropy, load = window.entropy.tolist(), window.load
        share = load / load.sum(1, keepdim=True).clamp(min=1) * experts  # of an even load
        warnings = []
        for layer, (bits, of_layer) in enumerate(zip(entropy, share.tolist(), strict=True)):
            idle = [expert for expert, value in enumerate(of_layer) if value < LEAST_SHARE]
            if bits >= LEAST_ENTROPY and not idle:
                self._warned.discard(layer)
            elif layer not in self._warned:
                self._warned.add(layer)
                what = (
                    f"expert(s) {', '.join(map(str, idle))} get almost no tokens"
                    if idle
                    else "a few experts get most tokens"
                )
                warnings.append(
                    f"WARNING: the router of layer {layer} is collapsing: {what} (load entropy {bits:.2f} of 1); raise "
                    "model.config.moe_aux_loss_coeff or lower optim.config.lr."
                )
        return warnings


def read_aux_losses(num_layers: int, num_microbatches: int) -> dict[str, list[float]]:
    """Megatron's router losses of the step just made, per name and layer; all ranks call it together."""
    found: dict[str, list[float]] = {}

    class Catch:
        """Takes what Megatron would write to TensorBoard."""

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if "_layer_" in name:
                found.setdefault(name.removeprefix("moe/").rpartition("_layer_")[0], []).append(value)

    get_moe_metrics_tracker().report(
        loss_scale=1 / num_microbatches,
        iteration=0,
        writer=Catch(),
        per_layer_logging=True,
        num_layers=num_layers,
    )
    return found
