"""Delayed scaling's state: the factor each FP8 tensor is scaled with, and the maxima it is chosen from.

It belongs to the tensors of one layout, so it is saved by rank and taken up where as many processes run in the same
layout; otherwise it is built up anew within the first steps. Transformer Engine's own ``_extra_state`` is a pickle,
which it refuses to load unless told that the file is trusted.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_MODES = {"scaling_fwd": "forward", "scaling_bwd": "backward"}
_BUFFERS = ("scale", "amax_history")


def fp8_key(rank: int, size: int) -> str:
    """The name of a rank's state in a checkpoint."""
    return f"fp8_state/shard_{rank}_{size}"


def fp8_state(model: list[Any]) -> dict[str, Tensor]:
    """Every buffer by its place in the model, on the CPU; empty in any other precision.

    Args:
        model: This rank's chunks.
    """
    return {
        f"{place}.{name}": getattr(meta[direction], name).detach().cpu()
        for place, meta, direction in _places(model)
        if hasattr(meta.get(direction), "amax_history")
        for name in _BUFFERS
    }


def set_fp8_state(model: list[Any], stored: dict[str, Tensor]) -> None:
    """Take up what `fp8_state` gave; a history of another length (``fp8_amax_history_len``) is left out.

    Args:
        model: This rank's chunks, before or after their first forward pass.
        stored: Buffers by place.
    """
    config = model[0].config
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    for place, meta, direction in _places(model):
        values = {name: stored[f"{place}.{name}"] for name in _BUFFERS if f"{place}.{name}" in stored}
        if len(values) < len(_BUFFERS):
            continue
        if direction not in meta:
            # Modules without FP8 weights make their state in the first forward pass, out of what they find here.
            meta[direction] = _new_state(config, _MODES[direction], len(values["scale"]), model)
        for name, value in values.items():
            buffer = getattr(meta[direction], name)
            if buffer.shape == value.shape:
                buffer.copy_(value)


def _places(model: list[Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    for number, chunk in enumerate(model):
        for name, module in chunk.named_modules():
            meta = getattr(module, "fp8_meta", None)
            if isinstance(meta, dict):
                for direction in _MODES:
                    yield f"{number}.{name}.{direction}", meta, direction


def _new_state(config: Any, mode: str, count: int, model: list[Any]) -> Any:
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
        DelayedScalingRecipeState,
    )

    device = next(model[0].parameters()).device
    return DelayedScalingRecipeState(get_fp8_recipe(config), mode=mode, num_quantizers=count, device=device)
