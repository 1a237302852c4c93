"""fp32 weights kept as a bf16 weight and what it leaves of them."""

import pytest
import torch

from mixtral_recipes.checkpoints.remainders import joined, split


def from_bits(*bits: int) -> torch.Tensor:
    """fp32 numbers, positive and negative."""
    return torch.tensor([*bits, *(each - 2**31 for each in bits)], dtype=torch.int32).view(torch.float32)


def test_joined_gives_back_what_was_split() -> None:
    values = torch.cat([torch.randn(10_000), from_bits(0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x35B28000, 0x7F7F7FFF)])
    assert torch.equal(joined(*split(values)), values)


@pytest.mark.parametrize(
    ("bits", "weight"),
    [
        (0x35B27FFF, 0x35B2),
        (0x35B28001, 0x35B3),
        (0x35B28000, 0x35B3),  # halfway: away from zero, as Transformer Engine's kernel; a cast gives the even 0x35B2
        (0x35B38000, 0x35B4),
    ],
)
def test_the_weight_is_rounded_as_by_transformer_engine(bits: int, weight: int) -> None:
    found, _ = split(from_bits(bits))
    assert found.float().tolist() == from_bits(weight << 16).tolist()
