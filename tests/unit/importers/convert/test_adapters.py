"""Adapters merged row by row equal the same sum done at once."""

import pytest
import torch

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapters import MergedRows
from mixtral_recipes.importers.hf.library import LibraryRows
from tests.unit.importers.rows import read_in_pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 3, 16])
def test_lora_rows(dtype: torch.dtype, piece: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator).to(dtype)
    a, b = torch.randn(4, 24, generator=generator), torch.randn(16, 4, generator=generator)
    merged = read_in_pieces(MergedRows(LibraryRows(weight), a, b, 0.5), piece, dtype)
    expected = (weight.float() + 0.5 * b @ a).to(dtype)
    torch.testing.assert_close(merged, expected)
    wide = read_in_pieces(MergedRows(LibraryRows(weight), a, b, 0.5, to="F32"), piece, torch.float32)
    torch.testing.assert_close(wide, weight.float() + 0.5 * b @ a)  # nothing of it rounded


def test_dora_rows_have_the_learned_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=generator)
    a, b = torch.randn(4, 12, generator=generator), torch.randn(8, 4, generator=generator)
    lengths = torch.rand(8, generator=generator) + 0.5
    merged = read_in_pieces(MergedRows(LibraryRows(weight), a, b, 1.0, lengths), 3, torch.float32)
    torch.testing.assert_close(merged.norm(dim=1), lengths)
    direction = weight + b @ a
    torch.testing.assert_close(merged / lengths[:, None], direction / direction.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_dora_rows_without_a_length_stay_as_they_are(value: float) -> None:
    weight = torch.ones(4, 12)
    weight[1] = value
    a, b = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 4)
    lengths = weight.square().sum(1).sqrt()
    merged = read_in_pieces(MergedRows(LibraryRows(weight), a, b, 1.0, lengths), 3, torch.float32)
    torch.testing.assert_close(merged, weight)


def test_a_sum_too_large_for_fp16_is_named_for_what_it_is() -> None:
    weight = torch.full((4, 8), 6e4, dtype=torch.float16)
    a, b = torch.ones(1, 8), torch.tensor([[0.0], [0.0], [1e4], [0.0]])
    rows = MergedRows(LibraryRows(weight), a, b, 1.0, name="decoder.layers.3.mlp")
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.3\.mlp with its adapter: contains 70000, .* fp16"):
        read_in_pieces(rows, 2, torch.float16)
