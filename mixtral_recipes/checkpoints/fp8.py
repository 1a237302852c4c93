"""What a checkpoint stores for a model in FP8: plain tensors in place of its weights, and delayed scaling's state.

Transformer Engine's FP8 weight cannot be cut into boxes or filled box by box: it has no memory of its dtype, and
writing to a part of it sets the scale of all of it.

Delayed scaling's state is the factor each FP8 tensor is scaled with, and the maxima it is chosen from. It belongs to
the tensors of one layout, so it is saved by rank and restored if as many processes run in the same layout; otherwise
it builds up again within the first steps. Transformer Engine's own ``_extra_state`` is a pickle, which it refuses to
load unless told that the file is trusted.
"""

import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import copy_tensor_to_quantized_param, dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from mixtral_recipes.checkpoints.format import shard

_LARGEST_E4M3 = 448.0
_MODES = {"scaling_fwd": "forward", "scaling_bwd": "backward"}
_BUFFERS = ("scale", "amax_history")


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for one parameter.

    Attributes:
        parameter: The weight, in FP8.
        tensor: Its values as a checkpoint stores them: in its shape and nominal dtype, on the CPU.
        memory: What ``tensor`` lies in: its pages can be given back while others look at it.
    """

    parameter: Any
    tensor: Tensor
    memory: mmap.mmap

    @classmethod
    def of(cls, parameter: Any) -> "StandIn | None":
        """The stand-in of a parameter, its values not yet taken; None if the parameter needs none."""
        if not is_float8tensor(parameter):
            return None
        memory = mmap.mmap(-1, parameter.numel() * parameter.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return cls(parameter, torch.frombuffer(memory, dtype=parameter.dtype).view(parameter.shape), memory)

    def take(self) -> None:
        """Take the parameter's values, before they are written."""
        self.tensor.copy_(dequantize_fp8_tensor(self.parameter.detach()))

    def put_back(self) -> None:
        """Quantize what was read into the parameter, and give its memory back.

        Delayed scaling would scale by what it last saw of the weight, which for one just made is nothing (a factor of
        1, at which a Mixtral's weights are close to the smallest numbers of the format), and a frozen weight is
        never quantized again. So it is scaled by what it is.

        The optimizer takes its fp32 weights from the values a parameter had before it was quantized, which Transformer
        Engine keeps until then: they are set to what was read, too.
        """
        values = self.tensor.to(self.parameter.device)
        _scale_by(values, self.parameter._quantizer)
        copy_tensor_to_quantized_param(self.parameter, values)
        kept = getattr(self.parameter, "get_high_precision_init_val", lambda: None)()
        if kept is not None:
            kept.copy_(self.tensor)
        self.memory.madvise(mmap.MADV_DONTNEED)


def _scale_by(values: Tensor, quantizer: Any) -> None:
    """Give delayed scaling's factor for one tensor the value it has for these; the other recipes find it themselves."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer  # pyright: ignore[reportMissingImports]

    if not isinstance(quantizer, Float8Quantizer):
        return
    largest = float(values.abs().max())
    if 0 < largest < math.inf:
        quantizer.scale.fill_(_LARGEST_E4M3 / largest)  # weights are e4m3 in either format


def forget_first_values(model: list[Any]) -> None:
    """Free the copies that Transformer Engine keeps of frozen weights for an optimizer to begin from.

    Args:
        model: This rank's chunks.
    """
    for chunk in model:
        for parameter in chunk.parameters():
            if not parameter.requires_grad and hasattr(parameter, "clear_high_precision_init_val"):
                parameter.clear_high_precision_init_val()


def take_all(stand_ins: Iterable[shard.StandIn | None]) -> None:
    """Take the values of all tensors stood in for, each once."""
    with torch.no_grad():
        for stand_in in {each for each in stand_ins if each is not None}:
            stand_in.take()


def fp8_key(rank: int, size: int) -> str:
    """The name of a rank's state in a checkpoint."""
    return f"fp8_state/shard_{rank}_{size}"


def fp8_state(model: list[Any]) -> dict[str, Tensor]:
    """Every buffer by its place in the model, on the CPU; empty in any other precision.

    Args:
        model: This rank's chunks.
    """
    return {
        f"{place}.{name}": getattr(state, name).detach().cpu() for place, state in _states(model) for name in _BUFFERS
    }


@contextmanager
def unmoved_fp8_state(model: list[Any]) -> Iterator[None]:
    """Leave delayed scaling's state as it was, whatever runs forward in between: validation, or generation.

    A forward pass without gradients writes its maxima where the next training step finds them, so how often a run
    validates would decide what it trains.

    Args:
        model: This rank's chunks.
    """
    before = {place: [getattr(state, name).clone() for name in _BUFFERS] for place, state in _states(model)}
    yield
    for place, state in _states(model):
        fresh = (torch.ones_like(state.scale), torch.zeros_like(state.amax_history))
        for name, value in zip(_BUFFERS, before.get(place, fresh), strict=True):
            getattr(state, name).copy_(value)


def set_fp8_state(model: list[Any], stored: dict[str, Tensor]) -> None:
    """Restore what `fp8_state` returned, except a history of another length (``fp8_amax_history_len``).

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


def _states(model: list[Any]) -> Iterator[tuple[str, Any]]:
    """Delayed scaling's states, which are made with FP8 weights or in the first forward pass."""
    for place, meta, direction in _places(model):
        if hasattr(meta.get(direction), "amax_history"):
            yield place, meta[direction]


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
