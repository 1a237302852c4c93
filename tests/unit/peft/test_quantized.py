"""The bytes of 4- and 8-bit weights against bitsandbytes, what they come back as, and what a layer keeps of them."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.peft.quantized import layers
from mixtral_recipes.peft.quantized.int8 import Int8
from mixtral_recipes.peft.quantized.nf4 import NF4
from mixtral_recipes.peft.quantized.split import Split

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional

    return functional


def matrix(rows: int, columns: int, kind: str = "normal") -> Tensor:
    torch.manual_seed(rows * columns)
    if kind == "heavy":
        return torch.distributions.StudentT(2.0).sample((rows, columns)) * 0.01
    drawn = torch.randn(rows, columns) * 0.02
    if kind == "holes":
        drawn[1] = 0
        drawn[2:4, 64:128] = 0
    return drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "kind"), [((128, 128), "normal"), ((1000, 192), "heavy"), ((300, 256), "holes")])
def test_nf4_has_bitsandbytes_bytes(bitsandbytes: Any, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    weight = matrix(*shape, kind).to(dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4.of(weight)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax)
    assert torch.equal(ours.nested, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.dequantize(dtype), bitsandbytes.dequantize_4bit(codes, state))


@pytest.mark.parametrize("block", [32, 128, 256])
def test_other_blocks_too_and_those_that_cross_rows(bitsandbytes: Any, block: int) -> None:
    weight = matrix(64, 96)
    # Its dequantisation on a CPU does not carry a block into the next row of a matrix: a vector has none.
    vector = weight.flatten()
    codes, state = bitsandbytes.quantize_4bit(vector, blocksize=block, compress_statistics=True, quant_type="nf4")
    ours = NF4.of(weight, block=block)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.dequantize(torch.float32).flatten(), bitsandbytes.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_has_bitsandbytes_bytes(bitsandbytes: Any, dtype: torch.dtype) -> None:
    weight = matrix(100, 192, "heavy").to(dtype)
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight)
    ours = Int8.of(weight)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, scales)
    assert torch.equal(ours.dequantize(torch.float32), bitsandbytes.int8_vectorwise_dequant(codes, scales))


def test_a_row_of_zeros_stays_one() -> None:
    weight = matrix(300, 256, "holes")
    assert not Int8.of(weight).dequantize(torch.float32)[1].any()
    assert NF4.of(weight).dequantize(torch.float32)[1].abs().max() < 1e-3 * weight.abs().max()


def test_the_errors_are_those_of_four_and_eight_bits() -> None:
    weight = torch.randn(512, 1024)
    for quantized, expected in ((NF4.of(weight), 0.092), (Int8.of(weight), 0.0075)):
        error = (quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
        assert error == pytest.approx(expected, rel=0.15)
    stored = sum(t.nbytes for t in NF4.of(weight).tensors().values())
    assert stored / weight.numel() == pytest.approx(0.516, abs=0.001)


def test_gpus_take_the_nearest_scale_where_cpus_look_it_up_in_a_table() -> None:
    weight = torch.randn(1024, 1024)
    here, there = NF4.of(weight), NF4.of(weight, on="cuda")
    assert torch.equal(here.codes, there.codes)
    differ = (here.absmax != there.absmax).float().mean()
    assert 0 < differ < 0.004
    exact = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    assert (there.scales() - exact).abs().sum() < (here.scales() - exact).abs().sum()


@pytest.mark.parametrize("split", [Split(0, 2, 1, 2), Split(0, 4, 3), Split(1, 2, 1), Split(1, 4, 2)])
def test_a_rank_holds_its_part_of_the_whole_matrix_bytes(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rank's scales are scaled by statistics of its own part."""
    whole = matrix(256, 512)
    codes, of_whole = split.mine(whole), whole.unflatten(1, (-1, 64)).abs().amax(-1)
    monkeypatch.setattr(Split, "gathered", lambda self, mine: of_whole)
    part = NF4.of(codes, split=split)
    expected = NF4.of(whole)
    assert torch.equal(part.absmax, split.mine(expected.absmax))
    assert torch.equal(part.dequantize(torch.float32), split.mine(expected.dequantize(torch.float32)))


def test_a_block_that_ranks_would_share_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"peft\.block_size=64 does not divide a rank's \[8, 96\] weights"):
        NF4.of(torch.randn(8, 96), split=Split(1, 2, 0))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_keeps_no_dequantised_weight(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing holds one after the product, forward or backward; of experts', one is there at a time."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    kind = NF4 if bits == 4 else Int8
    original = kind.dequantize

    def dequantize(self: Any, dtype: torch.dtype) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        out = original(self, dtype)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(kind, "dequantize", dequantize)
    format = layers.Format(bits, 64)
    weights = [format.quantize(matrix(128, 64 + 0 * n), Split()) for n in range(3)]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(6, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one = layers._Product.apply(x, weights[0], None)
        several = layers.GroupedProduct.apply(x, [1, 0, 5], weights)
    assert not saved, "the weight is frozen, so not even the input is needed"
    (one.sum() + several.sum()).backward()
    assert len(made) == 8
    assert max(alive) <= 1, "one is there while the next is made, at most"
    assert not [ref for ref in made if ref() is not None]
    assert x.grad is not None
    dense = [original(w, torch.float32) for w in weights]
    expected = dense[0].sum(0) + torch.stack([dense[0].sum(0), *[dense[2].sum(0)] * 5])
    torch.testing.assert_close(x.grad, expected)


def test_a_quantised_layer_holds_no_weight_in_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(perform_initialization=True)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    layer = torch.nn.Linear(64, 128, bias=False)
    layer.config, layer.tp_group = config, group  # pyright: ignore[reportAttributeAccessIssue]
    weight = weakref.ref(layer.weight)
    layers._give_up_memory(layer, layers.Format(4, 64), axis=0, halves=1)
    assert weight() is None
    assert layer.weight.is_meta
    assert not layer.weight.requires_grad
    assert layer.quantized.shape == (128, 64)
