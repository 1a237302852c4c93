"""NF4 with double quantisation, byte for byte what bitsandbytes' ``quantize_4bit(compress_statistics=True)`` gives.

64 weights in a row share a scale, their largest magnitude, and each is the nearest of 16 quantiles of a normal
distribution. The scales, less their mean, are kept in 8 bits, 256 of them sharing a scale again: 4.127 bits a weight.

On a CPU bitsandbytes looks a scale's code up in a table of 65,536 places, so that about one in 600 is the second
nearest. Bytes depend on it, so whoever makes them again elsewhere says where they were made (``on``).

Source: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3; bitsandbytes 0.50 `backends/default/ops.py`.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.peft.quantized import kernels
from mixtral_recipes.peft.quantized.split import WHOLE, Split, row_blocks

BLOCK = 64
NESTED = 256  # scales that share one

# Source: bitsandbytes 0.50 `functional.py`, get_4bit_type("nf4"); arXiv 2305.14314, appendix E.
_QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NF4:
    """A matrix [rows, columns] in 4 bits: a rank's part, and what its scales share with the whole.

    Attributes:
        codes: [rows, columns / 2] uint8, the first of two weights in the high bits. Where blocks do not end with a row,
            each block is a row.
        absmax: [rows, columns / block] uint8, the scales' own codes.
        nested: [scales of the whole matrix / 256] float32, what those are scaled with.
        offset: [] float32, the scales' mean.
        shape: [rows, columns] of the matrix.
        block: Weights that share a scale.
        split: Which part of the whole matrix it is.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor
    offset: Tensor
    shape: tuple[int, int]
    block: int = BLOCK
    split: Split = WHOLE

    @classmethod
    def of(cls, weight: Tensor, *, block: int = BLOCK, split: Split = WHOLE, on: str | None = None) -> "NF4":
        """Quantise this rank's part of a matrix; all ranks that share the matrix call it together.

        Args:
            weight: [rows, columns], bf16, fp16 or fp32.
            block: Weights that share a scale; even.
            split: Which part of the whole matrix it is.
            on: Whose bytes: those bitsandbytes makes on a ``"cpu"``, or on ``"cuda"``; None takes the weight's device.

        Raises:
            RecipeError: a block would not lie in one half of one rank's part.
        """
        shape = (weight.shape[0], weight.shape[1])
        if shape[1] % block:
            if (split.axis == 1 and split.size > 1) or weight.numel() % (block * split.halves):
                raise RecipeError(
                    f"peft.block_size={block} does not divide a rank's {list(shape)} weights into whole blocks; use a "
                    "smaller block or fewer tensor-parallel ranks, or peft.bits=8."
                )
            weight = weight.reshape(-1, block)
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(rows, columns // block, dtype=torch.float32, device=weight.device)
        for part in row_blocks(rows, columns):
            codes[part], absmax[part] = _coded(weight[part], block)
        scales = split.gathered(absmax)
        offset = scales.mean()
        nested_codes, nested = _code_scales((scales - offset).flatten(), binned=(on or weight.device.type) == "cpu")
        return cls(codes, split.mine(nested_codes.view_as(scales)), nested, offset, shape, block, split)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        return {name: getattr(self, name) for name in ("codes", "absmax", "nested", "offset")}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns]: code times scale in fp32, rounded once."""
        rows, half = self.codes.shape
        out = torch.empty(rows, 2 * half, dtype=dtype, device=self.device)
        if kernels.usable(self.device):
            self.dequantize_fused(out)
        else:
            scales = self.scales()
            for part in row_blocks(rows, 2 * half):
                out[part] = _values(self.codes[part], scales[part], self.block)
        return out.view(self.shape)

    def dequantize_fused(self, out: Tensor) -> None:
        """Write the values by the kernel; ``out`` has two weights for each of the codes."""
        tables = quantiles(self.device), levels(self.device)
        kernels.dequantize_nf4(self.tensors(), *tables, self.split.place(*self.absmax.shape), NESTED, out)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, [stop - start, columns]."""
        if self.codes.shape[0] != self.shape[0]:
            return self.dequantize(dtype)[start:stop]
        return _values(self.codes[start:stop], self.scales()[start:stop], self.block).to(dtype)

    def scales(self) -> Tensor:
        """[rows, columns / block], float32."""
        whole = self.nested_of(self.absmax.shape)
        return levels(self.device)[self.absmax.int()] * whole + self.offset

    def nested_of(self, shape: torch.Size) -> Tensor:
        """For each scale, what its code is scaled with: a tensor of its ``shape``, float32."""
        _, rows, _, columns, _ = self.split.place(*shape)
        numbers = torch.arange(rows * self.split.halves * columns, device=self.device).view(-1, columns)
        return self.nested[self.split.mine(numbers) // NESTED]


def quantiles(device: torch.device) -> Tensor:
    """The 16 values a code stands for, float32."""
    return _table("quantiles", device)


def levels(device: torch.device) -> Tensor:
    """The 256 values that a scale's code stands for: bitsandbytes' signed dynamic map, float32, ascending.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.1.
    """
    return _table("levels", device)


@functools.lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    """Tables are made on the CPU, so that they are the same everywhere."""
    if name == "quantiles":
        return torch.tensor(_QUANTILES).to(device)
    if name == "levels":
        return _dynamic_map().to(device)
    if name == "pairs":  # both weights of a byte, as one element of twice the size
        both = [torch.tensor(pair) for pair in itertools.product(_QUANTILES, repeat=2)]
        return torch.stack(both).view(torch.float64).flatten().to(device)
    values = torch.tensor(_QUANTILES) if name == "borders" else _dynamic_map()
    return ((values[:-1] + values[1:]) / 2).to(device)


def _dynamic_map() -> Tensor:
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (10 ** (exponent - 6)) * (bounds[:-1] + bounds[1:]) / 2.0
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found))


def _coded(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[r, c] -> codes of two weights in a byte [r, c / 2], and each block's largest magnitude [r, c / block]."""
    blocks = weight.float().unflatten(1, (-1, block))
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    codes = torch.bucketize(scaled, _table("borders", weight.device), out_int32=True).to(torch.uint8).flatten(1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], absmax


def _code_scales(scales: Tensor, *, binned: bool) -> tuple[Tensor, Tensor]:
    """Scales less their mean [n] -> their codes [n] uint8, and what 256 of them are scaled with."""
    rest = -scales.numel() % NESTED
    groups = torch.nn.functional.pad(scales, (0, rest)).view(-1, NESTED)
    nested = groups.abs().amax(-1)
    scaled = (groups * (1.0 / nested.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    if binned:
        scaled = torch.floor((scaled + 1) * 32767.5 + 0.5) / 32767.5 - 1
    codes = torch.bucketize(scaled, _table("level borders", scales.device), out_int32=True).to(torch.uint8)
    return codes.flatten()[: scales.numel()], nested


def _values(codes: Tensor, scales: Tensor, block: int) -> Tensor:
    """[r, c / 2] codes -> [r, c] float32."""
    pairs = _table("pairs", codes.device)[codes.int()].view(torch.float32)
    return (pairs.unflatten(1, (-1, block)) * scales.unsqueeze(-1)).flatten(1)
