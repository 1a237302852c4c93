"""fp32 weights that the optimizer keeps as what bf16 leaves of them.

Transformer Engine's FusedAdam (``store_param_remainders``) holds the lower 16 bits of each fp32 weight; the upper 16
are the model's own bf16 weight, one more where the lower half rounds up. A checkpoint has the whole fp32 weight, so
that a run with another optimizer state resumes from it.

Source: Transformer Engine `common/multi_tensor/adam.cu`, AdamFunctorMasterParamRemainder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Remainder:
    """What stands in for one parameter's fp32 weights.

    Attributes:
        weight: The model's weights of this rank's part [elements], bf16.
        remainder: The lower halves, int16.
        tensor: The fp32 weights as a checkpoint stores them, on the CPU.
    """

    weight: Tensor
    remainder: Tensor
    tensor: Tensor

    @classmethod
    def of(cls, weight: Tensor, remainder: Tensor) -> "Remainder":
        """The stand-in, its values not yet taken."""
        return cls(weight, remainder, torch.empty(weight.numel(), dtype=torch.float32, device="cpu"))

    def take(self) -> None:
        """Join the halves, before they are written."""
        self.tensor.copy_(joined(self.weight, self.remainder))

    def put_back(self) -> None:
        """Split what was read; the model's weights are set to the upper halves."""
        weight, remainder = split(self.tensor.to(self.weight.device))
        self.weight.copy_(weight)
        self.remainder.copy_(remainder)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 weights from bf16 ones and int16 remainders, any shape."""
    upper = weight.detach().reshape(-1).view(torch.int16).int() - (remainder.reshape(-1) < 0).int()
    lower = remainder.reshape(-1).int() & 0xFFFF
    return ((upper << 16) | lower).view(torch.float32).view(weight.shape)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weights, rounded half away from zero, and int16 remainders of fp32 weights: `joined`'s inverse."""
    bits = values.detach().contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # wraps to the lower half
    weight = ((bits >> 16) + (remainder < 0).int()).to(torch.int16).view(torch.bfloat16)
    return weight, remainder
