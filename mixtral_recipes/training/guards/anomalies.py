"""What must not reach the weights, and what deserves a look: losses and gradients that are not finite, and spikes."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.system.ranks import gathered, rank_and_size


class _NotFinite(Exception):
    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = norm


def checked_step(optimizer: Any) -> tuple[bool, float]:
    """``optimizer.step()``, abandoned before anything is updated if the gradient's norm is not finite.

    Megatron measures the norm over all ranks before it clips and updates; this looks at it in between.

    Returns:
        Whether the weights were updated, and the norm before clipping (0.0 where fp16's loss scaling skips a step).
    """
    measure = optimizer.get_grad_norm

    def measure_and_look() -> Any:
        norm = measure()
        if not math.isfinite(norm):
            raise _NotFinite(float(norm))
        return norm

    optimizer.get_grad_norm = measure_and_look
    try:
        with cpu_device.cuda_type_names():
            updated, norm, _ = optimizer.step()
    except _NotFinite as found:
        return False, found.norm
    finally:
        del optimizer.get_grad_norm
    return bool(updated), float(norm if norm is not None else 0.0)


def where_not_finite(model: list[Any], sums: list[Tensor], loss: float, grad_norm: float) -> str:
    """Which ranks a loss or gradient that is not finite came from. All ranks call it together.

    Args:
        model: This rank's chunks.
        sums: This rank's per-microbatch [loss sum, ...]; empty on earlier pipeline stages.
        loss: The global batch's loss.
        grad_norm: The global gradient norm; NaN where the loss was not finite already.
    """
    rank, _ = rank_and_size()
    bad_loss = bool(sums) and not bool(torch.isfinite(torch.stack(sums)).all())
    reports = gathered((rank, bad_loss, None if bad_loss else _bad_gradient(model)))
    ranks = [str(r) for r, bad, _ in reports if bad]
    if ranks:
        return f"the loss is {loss} on rank {', '.join(ranks)}"
    named = [(r, name) for r, _, name in reports if name]
    if named:
        return f"the gradient norm is {grad_norm}; not finite in {named[0][1]} on rank {named[0][0]}"
    return f"the loss is {loss}, the gradient norm {grad_norm}"


def _bad_gradient(model: list[Any]) -> str | None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return name
    return None


class SpikeWatch:
    """Flags a loss that stands out from the steps before it."""

    def __init__(self, window: int = 64, deviations: float = 6.0, least_rise: float = 0.2) -> None:
        """Look back ``window`` steps; flag more than ``deviations`` above their mean, and ``least_rise`` of it."""
        self._recent: deque[float] = deque(maxlen=window)
        self._deviations = deviations
        self._least_rise = least_rise

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is one; it then counts among the steps before the next."""
        enough = len(self._recent) >= 16
        mean = sum(self._recent) / max(1, len(self._recent))
        variance = sum((value - mean) ** 2 for value in self._recent) / max(1, len(self._recent))
        self._recent.append(loss)
        rise = max(self._deviations * math.sqrt(variance), self._least_rise * abs(mean))
        return enough and loss > mean + rise
