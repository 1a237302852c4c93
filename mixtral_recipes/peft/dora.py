"""DoRA: LoRA that learns the length of each weight row apart from its direction."""

from typing import Any

import torch
from torch import Tensor, nn

from mixtral_recipes.peft.adapter import Adapter
from mixtral_recipes.peft.lengths import stretch
from mixtral_recipes.settings.peft import LoRA


class DoRAAdapter(Adapter):
    """A low-rank part with the lengths of the adapted weight's rows, ``magnitude`` [out] ([2, ffn] for a gated fc1)."""

    def __init__(self, scheme: LoRA, name: str, weight: Tensor, *, column: bool, config: Any, **place: Any) -> None:
        super().__init__(scheme, name, weight, column=column, config=config, **place)
        # In a tuple, so that the frozen weight is not a second parameter of this module.
        self._weight = (weight,)
        self.magnitude = nn.Parameter(torch.empty(self.halves, dtype=self.lora_a.dtype, device=weight.device))
        if not weight.is_meta:
            with torch.no_grad():
                self.magnitude.copy_(self.row_lengths().view(self.halves))
        self._mark()

    def split_axes(self) -> dict[str, int | None]:
        """As the base class's; lengths are split as the rows are."""
        return super().split_axes() | {"magnitude": len(self.halves) - 1 if self.column else None}

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|W + s B A| of each row, [out], fp32: of the whole row, also where its columns are split.

        Expands |w + s b A|^2 = |w|^2 + 2 s w A^T b + s^2 b A A^T b, so that the product B A is never formed.
        """
        weight = self._weight[0]
        w = _values(weight)
        a, b = self.lora_a.float(), self.lora_b.flatten(0, -2).float() * self.scale
        squares = w.square().sum(1) + 2 * ((w @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
        if not self.column and self.tp_group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.tp_group)
        return squares.clamp(min=0).sqrt()

    def factors(self) -> Tensor:
        """What brings the rows to their learned lengths."""
        return stretch(self.magnitude.flatten().float(), self.row_lengths())

    def delta(self) -> Tensor:
        """What turns the layer's (local) weight into the merged one: shape and split of the weight, fp32."""
        w = _values(self._weight[0])
        return (w + super().delta()) * self.factors().unsqueeze(1) - w


def _values(weight: Tensor) -> Tensor:
    """A weight in fp32, also one that Transformer Engine stores in FP8."""
    quantized = type(weight).__name__.endswith("Tensor") and type(weight) is not Tensor
    return (weight.dequantize() if quantized else weight).float()
