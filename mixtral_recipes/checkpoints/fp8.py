"""Plain tensors in place of weights that Transformer Engine keeps in FP8, where a checkpoint is written or read.

An FP8 weight cannot be cut into boxes or filled box by box: it has no memory of its dtype, and writing to a part of it
sets the scale of all of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import copy_tensor_to_quantized_param, dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for one parameter.

    Attributes:
        parameter: The weight, in FP8.
        tensor: Its values as a checkpoint has them: of its shape, in its nominal dtype, on the CPU.
    """

    parameter: Any
    tensor: Tensor

    @classmethod
    def of(cls, parameter: Any) -> "StandIn | None":
        """A parameter's, its values not yet taken; None where it stands for itself."""
        if not is_float8tensor(parameter):
            return None
        return cls(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))

    def take(self) -> None:
        """Take the parameter's values, before they are written."""
        self.tensor.copy_(dequantize_fp8_tensor(self.parameter.detach()))

    def put_back(self) -> None:
        """Quantize what was read into the parameter.

        The optimizer takes its fp32 weights from the values a parameter had before it was quantized, which Transformer
        Engine keeps until then: they are set to what was read, too.
        """
        copy_tensor_to_quantized_param(self.parameter, self.tensor.to(self.parameter.device))
        kept = getattr(self.parameter, "get_high_precision_init_val", lambda: None)()
        if kept is not None:
            kept.copy_(self.tensor)


def take_all(stand_ins: Iterable[StandIn | None]) -> None:
    """Take the values of all parameters stood in for, each once."""
    with torch.no_grad():
        for stand_in in {each for each in stand_ins if each is not None}:
            stand_in.take()


def put_all_back(stand_ins: Iterable[StandIn | None]) -> None:
    """Put back the values of all parameters stood in for, each once."""
    with torch.no_grad():
        for stand_in in {each for each in stand_ins if each is not None}:
            stand_in.put_back()
