"""Eight bits a weight, each row scaled by its largest magnitude: what bitsandbytes' ``load_in_8bit`` keeps.

Of bitsandbytes' two 8-bit forms this is the one weights are published and loaded in (LLM.int8()); the other, blockwise
with a dynamic map, is meant for optimizer states and rounds weights more coarsely. A row's scale is a maximum, so it
is the same however ranks cut the row. Unlike in LLM.int8() the product itself is in 16 bits: activations are not
quantised, and no outliers need to be told apart.

Source: Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 2; bitsandbytes 0.50 `backends/default/ops.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral_recipes.peft.quantized import kernels
from mixtral_recipes.peft.quantized.split import WHOLE, Split, row_blocks

INVERSE = 7.874015718698502e-3  # 1 / 127


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix [rows, columns] in 8 bits: a rank's part.

    Attributes:
        codes: [rows, columns] int8.
        absmax: [rows] float32, the largest magnitude of each whole row.
        split: Which part of the whole matrix it is.
    """

    codes: Tensor
    absmax: Tensor
    split: Split = WHOLE

    @classmethod
    def of(cls, weight: Tensor, *, split: Split = WHOLE) -> "Int8":
        """Quantise this rank's part of a matrix; all ranks that share the matrix call it together.

        Args:
            weight: [rows, columns], bf16, fp16 or fp32.
            split: Which part of the whole matrix it is.
        """
        absmax = weight.abs().amax(1).float()
        if split.axis == 1 and split.size > 1:
            torch.distributed.all_reduce(absmax, op=torch.distributed.ReduceOp.MAX, group=split.group)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        factors = torch.where(absmax > 0, 127.0 / absmax, 0.0).unsqueeze(1)
        for part in row_blocks(*weight.shape):
            codes[part] = torch.round(weight[part].float() * factors[part]).to(torch.int8)
        return cls(codes, absmax, split)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns] of the matrix."""
        return self.codes.shape[0], self.codes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        return {"codes": self.codes, "absmax": self.absmax}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns]: code times scale in fp32, rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if kernels.usable(self.device):
            kernels.dequantize_int8(self.codes, self.absmax, out)
            return out
        for part in row_blocks(*self.shape):
            out[part] = self.rows(part.start, part.stop, dtype)
        return out

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, [stop - start, columns]."""
        return (self.codes[start:stop].float() * self.absmax[start:stop].unsqueeze(1) * INVERSE).to(dtype)
