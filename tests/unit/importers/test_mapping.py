"""The table, checked against names and layouts spelled out by hand."""

import itertools

import pytest
import torch

from mixtral_recipes.importers.mapping import (
    WEIGHTS,
    canonical_shapes,
    canonical_sources,
    disk_shape,
    hf_tensors,
    merge_blocks,
    shape_of,
)
from mixtral_recipes.layout.shapes import MIXTRAL_8X7B, MIXTRAL_8X22B, ModelShape

DIMS = ModelShape(2, 32, 4, 2, 48, 4, 64, vocab_size=300)


@pytest.mark.parametrize(("dims", "count"), [(MIXTRAL_8X7B, 46_702_792_704), (MIXTRAL_8X22B, 140_620_634_112)])
def test_published_parameter_counts(dims: ModelShape, count: int) -> None:
    def numbers(shapes: list[tuple[int, ...]]) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes)

    assert numbers(list(canonical_shapes(dims).values())) == count
    assert numbers([parts.shape for parts in hf_tensors(dims, fused=True).values()]) == count
    assert numbers([disk_shape(weight, dims) for weight in WEIGHTS]) == count


def test_shapes_on_disk() -> None:
    assert {weight.disk: disk_shape(weight, DIMS) for weight in WEIGHTS} == {
        "embedding.word_embeddings.weight": (300, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 64, 32),
        "decoder.layers.self_attention.linear_proj.weight": (2, 32, 32),
        "decoder.layers.pre_mlp_layernorm.weight": (2, 32),
        "decoder.layers.mlp.router.weight": (2, 4, 32),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 4, 96, 32),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 4, 32, 48),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (300, 32),
    }
    assert {weight.extra_state for weight in WEIGHTS if weight.extra_state} == {
        "decoder.layers.self_attention.linear_qkv._extra_state",
        "decoder.layers.self_attention.linear_proj._extra_state",
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state",
        "decoder.layers.mlp.experts.experts.linear_fc2._extra_state",
        "decoder.layers.pre_mlp_layernorm._extra_state",
        "decoder.final_layernorm._extra_state",
    }


def test_qkv_is_interleaved_per_group() -> None:
    """Against the reshape Megatron's attention undoes: [groups, (queries per group + key + value), head, hidden]."""
    q, k, v = torch.randn(32, 32), torch.randn(16, 32), torch.randn(16, 32)
    grouped = torch.cat([q.view(2, 2, 8, 32), k.view(2, 1, 8, 32), v.view(2, 1, 8, 32)], dim=1)
    weight = next(weight for weight in WEIGHTS if weight.transform == "qkv")
    parts = dict(zip(weight.hf, (q, k, v), strict=True))
    rows = [
        parts[block.name.replace("layers.1.", "layers.{layer}.")][block.start : block.stop]
        for block in merge_blocks(weight, DIMS, 1, None)
    ]
    assert torch.equal(torch.cat(rows), grouped.view(64, 32))


def test_gate_comes_before_up() -> None:
    weight = next(weight for weight in WEIGHTS if weight.transform == "stack")
    names = [block.name for block in merge_blocks(weight, DIMS, 0, 3)]
    assert [name.rsplit(".", 2)[1] for name in names] == ["w1", "w3"]


def test_every_canonical_row_has_one_place() -> None:
    shapes = canonical_shapes(DIMS)
    sources = canonical_sources(DIMS)
    assert sources.keys() == shapes.keys()
    used: dict[tuple[str, int | None, int | None], list[tuple[int, int]]] = {}
    for name, (weight, layer, expert, ranges) in sources.items():
        assert sum(stop - start for start, stop in ranges) == shapes[name][0]
        used.setdefault((weight.disk, layer, expert), []).extend(ranges)
    for (disk, _, _), ranges in used.items():
        weight = next(weight for weight in WEIGHTS if weight.disk == disk)
        rows = sum(shape_of(shape, DIMS)[0] for shape in weight.shapes)
        edges = sorted(ranges)
        assert edges[0][0] == 0
        assert edges[-1][1] == rows
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(edges))


def test_fused_names() -> None:
    fused = hf_tensors(DIMS, fused=True)
    parts = fused["model.layers.1.mlp.experts.gate_up_proj"]
    assert parts.shape == (4, 96, 32)
    assert [name.split(".", 4)[4] for name in parts.names[:3]] == [
        "experts.0.w1.weight",
        "experts.0.w3.weight",
        "experts.1.w1.weight",
    ]
    assert fused["model.layers.0.mlp.gate.weight"].shape == (4, 32)
    assert not any("block_sparse_moe" in name for name in fused)
