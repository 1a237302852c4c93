"""Rows seen in another order, read in pieces of any size."""

from pathlib import Path

import pytest
import torch

from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, Extent
from mixtral_recipes.importers import views
from mixtral_recipes.importers.views import RowRanges, Transposed, TurnedHeads
from tests.unit.importers.rows import read_in_pieces


def stored(tensor: torch.Tensor, path: Path) -> Extent:
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    names = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}
    return Extent(str(path), 0, names[tensor.dtype], tensor.shape[0], tensor.shape[1] * tensor.element_size())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [1, 3, 8, 24])
def test_every_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(views, "_BAND_BYTES", 200)  # several bands, and several pieces of each
    monkeypatch.setattr(views, "_PIECE_BYTES", 100)
    tensor = torch.randn(24, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    extent = stored(tensor, tmp_path / "weights")
    assert torch.equal(
        read_in_pieces(RowRanges([(extent, 20, 24), (extent, 3, 8), (extent, 8, 9)]), piece, dtype),
        tensor[[*range(20, 24), *range(3, 9)]],
    )
    halves = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in tensor.split(8)])
    assert torch.equal(read_in_pieces(TurnedHeads(extent, 8), piece, dtype), halves)
    assert torch.equal(read_in_pieces(Transposed(extent), piece, dtype), tensor.T)


def test_a_transposed_matrix_is_let_go_after_its_last_row(tmp_path: Path) -> None:
    view = Transposed(stored(torch.randn(6, 4), tmp_path / "weights"))
    read_in_pieces(view, 2, torch.float32)
    assert view._band[1].size == 0
