"""The layout arithmetic, every preflight rule, and the repairs."""

import re
from dataclasses import replace

import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.repair import check_layout, check_recipe_layout, nearest_layout, repair
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology

M7 = ModelShape(32, 4096, 32, 8, 14336, 8, 4096)
M22 = ModelShape(56, 6144, 48, 8, 16384, 8, 4096)
TINY = ModelShape(4, 128, 8, 4, 256, 8, 512)
TUNE, TRAIN = BatchShape(128, 1, 2048), BatchShape(512, 1, 4096)

# name -> (layout, model, batch, a part of each violation's text, in order)
BROKEN: dict[str, tuple[Topology, ModelShape, BatchShape, list[str]]] = {
    "nemo: 8x7b full on 8 GPUs": (
        Topology(8, 1, 4, 8, 1, 8),
        M7,
        TUNE,
        ["world size 8 is not a multiple of expert TP x EP x PP = 1 x 8 x 4 = 32"],
    ),
    "nemo: 8x22b full on 64 GPUs": (
        Topology(64, 8, 4, 14, 1, 8),
        M22,
        TUNE,
        ["expert TP x EP x PP = 8 x 8 x 4 = 256", "tensor_model_parallel_size=8 needs sequence_parallel=True"],
    ),
    "nemo: 8x22b adapters without SP": (
        Topology(64, 8, 1, None, 1, 8),
        M22,
        TUNE,
        ["tensor_model_parallel_size=8 needs sequence_parallel=True"],
    ),
    "EP does not divide the experts": (
        Topology(9, expert_model_parallel_size=3),
        M7,
        BatchShape(126, 1, 2048),
        ["expert_model_parallel_size=3 does not divide num_moe_experts=8; use 1, 2, 4 or 8."],
    ),
    "TP does not divide heads or groups": (
        Topology(12, tensor_model_parallel_size=12, expert_tensor_parallel_size=1, sequence_parallel=True),
        M7,
        BatchShape(128, 1, 2052),
        ["does not divide num_attention_heads=32", "does not divide num_query_groups=8; use 1, 2, 4 or 8."],
    ),
    "more TP than KV groups": (
        Topology(16, tensor_model_parallel_size=16, sequence_parallel=True),
        M7,
        TUNE,
        ["tensor_model_parallel_size=16 does not divide num_query_groups=8"],
    ),
    "expert TP does not divide the ffn": (
        Topology(6, expert_tensor_parallel_size=3),
        M7,
        BatchShape(126, 1, 2048),
        ["expert_tensor_parallel_size=3 does not divide ffn_hidden_size=14336"],
    ),
    "PP does not divide the layers": (
        Topology(5, pipeline_model_parallel_size=5),
        M7,
        TUNE,
        ["5 x 1 does not divide num_layers=32"],
    ),
    "PP x VPP do not divide the layers": (
        Topology(4, 1, 4, 7),
        M7,
        TUNE,
        ["4 x 7 does not divide num_layers=32"],
    ),
    "VPP without PP": (
        Topology(8, virtual_pipeline_model_parallel_size=4),
        M7,
        TUNE,
        ["virtual_pipeline_model_parallel_size=4 needs pipeline_model_parallel_size > 1; set it to None."],
    ),
    "world not a multiple of TP x PP x CP": (
        Topology(8, context_parallel_size=3),
        M7,
        BatchShape(128, 1, 2046),
        ["is not a multiple of TP x PP x CP = 1 x 1 x 3 = 3"],
    ),
    "SP without TP": (
        Topology(8, sequence_parallel=True),
        M7,
        TUNE,
        ["sequence_parallel=True needs tensor_model_parallel_size > 1"],
    ),
    "sequence does not split over CP": (
        Topology(8, context_parallel_size=8),
        M7,
        BatchShape(128, 1, 2040),
        ["seq_length=2040 is not a multiple of 16 (2 x CP if CP > 1, times TP with sequence parallelism)."],
    ),
    "sequence does not split over CP and TP": (
        Topology(8, 2, 1, None, 4, 1, None, True),
        M7,
        BatchShape(128, 1, 2056),
        ["seq_length=2056 is not a multiple of 16"],
    ),
    "GBS not a multiple of MBS x DP": (
        Topology(8),
        M7,
        BatchShape(100, 1, 2048),
        ["global_batch_size=100 is not a multiple of micro_batch_size x data-parallel size = 1 x 8; use 104."],
    ),
    "too few microbatches to interleave": (
        Topology(32, 1, 4, 8, 1, 8),
        M7,
        BatchShape(8, 1, 2048),
        ["microbatches per step (1) to be a multiple of pipeline_model_parallel_size=4"],
    ),
    "packed with MBS 2": (
        Topology(8, expert_model_parallel_size=8),
        M7,
        BatchShape(16, 2, 2048, packed=True),
        ["packed sequences need micro_batch_size=1, not 2."],
    ),
    "FP8 tokens": (
        Topology(8),
        M7,
        BatchShape(128, 1, 2040, fp8=True),
        ["FP8 needs a multiple of 16 tokens per rank; seq_length=2040"],
    ),
    "FP8 rows": (
        Topology(16, expert_tensor_parallel_size=16, tensor_model_parallel_size=2, sequence_parallel=True),
        ModelShape(32, 4096, 32, 8, 14400, 8, 4096),
        BatchShape(128, 1, 2048, fp8=True),
        ["FP8 needs a multiple of 16 rows per rank; ffn_hidden_size=14400"],
    ),
    "sequence longer than the positions": (
        Topology(8),
        M7,
        BatchShape(128, 1, 8192),
        ["seq_length=8192 exceeds max_position_embeddings=4096"],
    ),
    "sizes below one": (
        Topology(8, tensor_model_parallel_size=0, context_parallel_size=-2),
        M7,
        BatchShape(128, 0, 2048),
        [
            "tensor_model_parallel_size=0 must be at least 1.",
            "context_parallel_size=-2 must be at least 1.",
            "expert_tensor_parallel_size=0 must be at least 1.",
            "micro_batch_size=0 must be at least 1.",
        ],
    ),
    "everything at once": (
        Topology(128, 16, 3, 7, 5, 16, 3),
        M22,
        BatchShape(7, 2, 70000, packed=True, fp8=True),
        [
            "TP x PP x CP = 16 x 3 x 5 = 240",
            "expert TP x EP x PP = 3 x 16 x 3 = 144",
            "expert_model_parallel_size=16 does not divide",
            "does not divide num_query_groups=8",
            "does not divide ffn_hidden_size=16384",
            "3 x 7 does not divide num_layers=56",
            "needs sequence_parallel=True",
            "FP8 needs a multiple of 16 rows per rank; ffn_hidden_size",
            "exceeds max_position_embeddings",
            "packed sequences need micro_batch_size=1",
        ],
    ),
    "three processes for the tiny model": (
        Topology(3, expert_model_parallel_size=2),
        TINY,
        BatchShape(32, 16, 256),
        ["expert TP x EP x PP = 1 x 2 x 1 = 2", "16 x 3; use 48."],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_gives_all_its_violations_and_a_repair_that_passes(name: str) -> None:
    layout, model, batch, expected = BROKEN[name]
    found = violations(layout, model, batch)
    assert len(found) == len(expected), found
    for text, part in zip(found, expected, strict=True):
        assert part in text
    fix = repair(layout, model, batch)
    assert fix is not None
    assert violations(fix.topology, fix.model, fix.batch) == []
    assert fix.topology.world_size == layout.world_size
    with pytest.raises(RecipeError) as caught:
        check_layout(layout, model, batch)
    assert all(text in str(caught.value) for text in found)
    assert str(caught.value).endswith(f"To repair: {' '.join(fix.settings)}")


def test_a_repair_changes_no_more_than_it_must() -> None:
    layout, model, batch, _ = BROKEN["nemo: 8x22b adapters without SP"]
    fix = repair(layout, model, batch)
    assert fix is not None
    assert fix.settings == ("trainer.strategy.sequence_parallel=True",)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({"num_query_groups": 6}, "num_query_groups=6 does not divide num_attention_heads=32."),
        ({"num_attention_heads": 4}, "num_query_groups=8 does not divide num_attention_heads=4."),
        ({"kv_channels": 7}, "kv_channels=7, the size of an attention head, must be even"),
        ({"hidden_size": 32}, "hidden_size / num_attention_heads = 1, the size of an attention head, must be even"),
        ({"hidden_size": 16}, "hidden_size / num_attention_heads = 0, the size of an attention head, must be even"),
    ],
)
def test_sizes_that_make_no_model_are_refused_on_every_layout(sizes: dict[str, int], rule: str) -> None:
    model = replace(M7, **sizes)
    for layout in (Topology(1), Topology(8, 2, sequence_parallel=True)):
        with pytest.raises(RecipeError, match=re.escape(rule)) as caught:
            check_layout(layout, model, TUNE)
        assert "To repair" not in str(caught.value)
        assert repair(layout, model, TUNE) is None


@pytest.mark.parametrize(
    ("layout", "batch", "settings"),
    [
        (Topology(8, expert_model_parallel_size=8), BatchShape(30, 1, 4096), ["data.global_batch_size=32"]),
        (Topology(8, expert_model_parallel_size=8), BatchShape(32, 3, 4096), ["data.global_batch_size=48"]),
        (Topology(8), BatchShape(64, 4, 4096, packed=True), ["data.micro_batch_size=1"]),
        (Topology(32, 1, 4, 8, 1, 8), BatchShape(8, 1, 2048), ["data.global_batch_size=32"]),
        (Topology(8, context_parallel_size=8), BatchShape(8, 1, 2040), ["data.seq_length=2048"]),
        (Topology(8), BatchShape(8, 1, 8192), ["model.config.max_position_embeddings=8192"]),
    ],
    ids=["too few", "odd microbatches", "packed", "interleaved", "length", "positions"],
)
def test_a_mistake_in_the_batch_is_repaired_in_the_batch(
    layout: Topology, batch: BatchShape, settings: list[str]
) -> None:
    fix = repair(layout, M7, batch)
    assert fix is not None
    assert list(fix.settings) == settings


def test_a_layout_that_works_needs_no_repair() -> None:
    layout = Topology(64, 1, 4, 8, 1, 8)
    assert violations(layout, M7, TRAIN) == []
    assert nearest_layout(layout, M7, TRAIN) == layout
    check_layout(layout, M7, TRAIN)


def test_no_processes_cannot_be_repaired() -> None:
    with pytest.raises(RecipeError, match=r"^world size=0 must be at least 1\.$"):
        check_layout(Topology(0), M7, TRAIN)


def test_the_arithmetic_of_mixtral_8x22b() -> None:
    layout = Topology(128, 2, 4, 14, 2, 8, None, True)
    assert layout.model_ranks == 16
    assert layout.data_parallel_size == 8
    assert layout.expert_ranks == 64
    assert layout.expert_data_parallel_size == 2
    assert layout.num_microbatches(TRAIN) == 64
    assert layout.describe() == "TP2 PP4 VPP14 CP2 EP8 DP8 SP"


@pytest.mark.parametrize(
    ("tp", "vocab_size", "unit", "padded"),
    [(1, 32000, 128, 32000), (4, 32000, 128, 32256), (8, 32768, 128, 32768), (2, 1999, 1, 2000)],
)
def test_the_vocabulary_is_padded_for_tensor_parallelism(tp: int, vocab_size: int, unit: int, padded: int) -> None:
    model = ModelShape(4, 128, 8, 4, 256, 8, 512, vocab_size, unit)
    assert model.padded_vocab_size(tp) == padded


@pytest.mark.parametrize("packs", [-1, 512])
def test_one_kernel_for_projections_and_rotation_takes_no_packs(packs: int) -> None:
    recipe = llm.mixtral_8x7b.finetune_recipe(name="tune", num_nodes=1, num_gpus_per_node=8)
    recipe.data.seq_length = 512
    recipe.data.packed_sequence_specs = llm.PackedSequenceSpecs(packed_sequence_size=packs)
    recipe.data.micro_batch_size = 1
    check_recipe_layout(recipe.model, recipe.trainer, recipe.data)
    recipe.model.config.fused_single_qkv_rope = True
    if packs < 0:
        check_recipe_layout(recipe.model, recipe.trainer, recipe.data)
    else:
        with pytest.raises(RecipeError, match="takes no packed sequences; leave it out"):
            check_recipe_layout(recipe.model, recipe.trainer, recipe.data)
