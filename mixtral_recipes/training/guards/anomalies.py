"""Guards against non-finite losses and gradients, which must not reach the weights, and detection of loss spikes."""

import math
import re
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.peft import names
from mixtral_recipes.system.ranks import gathered, rank_and_size

# A loss spikes when it is so many standard deviations above the mean of the last steps, and by so large a share of it.
_DEVIATIONS, _LEAST_RISE = 6.0, 0.2
_WINDOW, _FEWEST = 64, 16  # the steps looked back at, and how many there must be


class Update(NamedTuple):
    """What became of an optimizer's step.

    Attributes:
        updated: Whether the weights are others than before.
        grad_norm: The gradient's norm before clipping (0.0 where fp16's loss scaling skips a step).
        num_zeros_in_grad: How many of its entries are zero; None without ``optim.config.log_num_zeros_in_grad``.
    """

    updated: bool
    grad_norm: float
    num_zeros_in_grad: int | None = None


class _NotFinite(Exception):
    """The gradient's norm is not."""


def checked_step(optimizer: Any) -> Update:
    """``optimizer.step()``, abandoned before anything is updated if the gradient's norm is not finite.

    Megatron measures the norm over all ranks before it clips and updates; this looks at it in between.
    """
    measure, seen = optimizer.get_grad_norm, 0.0

    def measure_and_look() -> Any:
        nonlocal seen
        norm = measure()
        seen = float(norm)  # once: after the step a look at it would wait for the update
        if not math.isfinite(seen):
            raise _NotFinite
        return norm

    optimizer.get_grad_norm = measure_and_look
    try:
        with cpu_device.cuda_type_names():
            updated, _, zeros = optimizer.step()
    except _NotFinite:
        updated, zeros = False, None
    finally:
        del optimizer.get_grad_norm
    return Update(bool(updated), seen, zeros)


def where_not_finite(
    model: list[Any], sums: list[Tensor], loss: float, grad_norm: float, forward: Callable[[], object]
) -> str:
    """Where a loss or gradient that is not finite came from. All ranks call it together.

    Args:
        model: This rank's chunks.
        sums: This rank's per-microbatch [loss sum, ...]; empty on earlier pipeline stages.
        loss: The global batch's loss.
        grad_norm: The global gradient norm; NaN where the loss was not finite already.
        forward: Sends the step's batch through the model once more, without gradients.
    """
    rank, _ = rank_and_size()
    bad_loss = bool(sums) and not bool(torch.isfinite(torch.stack(sums)).all())
    reports = gathered((rank, bad_loss, None if bad_loss else _bad_gradient(model)))
    ranks = [str(r) for r, bad, _ in reports if bad]
    if ranks:
        return f"the loss is {loss} on rank {', '.join(ranks)}{_origin(model, forward)}"
    of_rank = [(r, name) for r, _, name in reports if name]
    if of_rank:
        return f"the gradient norm is {grad_norm}; not finite in {of_rank[-1][1]} on rank {of_rank[-1][0]}"
    return f"the loss is {loss} and the gradient norm is {grad_norm}"


def _bad_gradient(model: list[Any]) -> str | None:
    """The last parameter with such a gradient: backward goes from the last layer to the first, and spoils the rest."""
    bad = None
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                bad = _global_name(chunk, name)
    return bad


def _origin(model: list[Any], forward: Callable[[], object]) -> str:
    """The layer whose output is the first that is not finite, as the end of a sentence; empty if none is."""
    found: list[tuple[str, str]] = []

    def watch(chunk: Any, name: str, module: Any) -> Any:
        def look(_module: Any, _args: Any, output: Any) -> None:
            if not found and not _all_finite(output):
                found.append((_global_name(chunk, name), _bad_weight(module)))

        return module.register_forward_hook(look)

    hooks = [watch(chunk, name, module) for chunk in model for name, module in chunk.named_modules() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    everywhere = [(name, weight, r) for r, ours in enumerate(gathered(found)) for name, weight in ours]
    if not everywhere:
        return ""
    # Of one layer, the innermost: what is around it, here and on other ranks, only passes its values on.
    name, weight, rank = min(everywhere, key=lambda origin: (_layer_number(origin[0]), -origin[0].count(".")))
    reason = f", whose {weight} is not finite" if weight else ""
    return f"; the first non-finite values come from {name} on rank {rank}{reason}"


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        # A quantised weight has no memory of its own; its scales were finite when it was made.
        return not value.is_floating_point() or value.is_meta or bool(torch.isfinite(value).all())
    return all(map(_all_finite, value)) if isinstance(value, tuple | list) else True


def _bad_weight(module: Any) -> str:
    return next((name for name, weight in module.named_parameters() if not _all_finite(weight.detach())), "")


def _global_name(chunk: Any, name: str) -> str:
    """A module's name with its layer and expert counted over all ranks, where it is in a layer."""
    whole = re.match(r"decoder\.layers\.\d+\.(?!mlp\.experts)|.*\.local_experts\.\d+\.", name)
    return names.global_name(chunk, name) if whole else name


def _layer_number(name: str) -> float:
    found = re.match(r"decoder\.layers\.(\d+)", name)
    return int(found[1]) if found else -1 if name.startswith("embedding") else math.inf


class SpikeWatch:
    """Flags a loss that stands out from up to `_WINDOW` steps before it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is one; it then counts among the steps before the next."""
        enough = len(self._recent) >= _FEWEST
        mean = sum(self._recent) / max(1, len(self._recent))
        variance = sum((value - mean) ** 2 for value in self._recent) / max(1, len(self._recent))
        self._recent.append(loss)
        rise = max(_DEVIATIONS * math.sqrt(variance), _LEAST_RISE * abs(mean))
        return enough and loss > mean + rise
