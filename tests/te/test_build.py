"""Every size and precision builds from Transformer Engine's modules at 8 to 1024 GPUs, and fits the checkpoints.

First and last rank (first and last pipeline stage); parameter names and shapes, and where each part lies in a
checkpoint, are compared with the mapping that import and export read.
"""

import dataclasses
from typing import Any

import pytest

from mixtral_recipes.executors.preflight import preflight
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, disk_shape, merge_blocks, shape_of
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.overrides import loading
from mixtral_recipes.training.precision import check_device
from tests.te.conftest import BuildRank, pretend_gpu

SIZES = ("mixtral_8x7b", "mixtral_8x22b")
# name -> (settings of trainer.plugins, hardware)
PRECISIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({}, "h100"),
    "delayed": ({"fp8": "hybrid", "fp8_recipe": "delayed"}, "h100"),
    "delayed-e4m3": ({"fp8": "e4m3", "fp8_recipe": "delayed"}, "h100"),
    "tensorwise": ({"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}, "h100"),
    "blockwise": ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, "h100"),
    "mxfp8": ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, "b200"),
}
# The axis of a weight that tensor parallelism splits, by the end of its name; all others are whole on every rank.
SPLIT_AXES = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}


def pretraining(size: str, world: int, precision: str) -> tuple[Any, str]:
    """The pretraining recipe on so many GPUs; on fewer than its layout needs, with every stage on one rank."""
    settings, hardware = PRECISIONS[precision]
    recipe = loading.load(size, "pretrain", num_nodes=world // 8, num_gpus_per_node=8)
    strategy = recipe.trainer.strategy
    if (
        Topology.of(recipe.trainer).world_size
        < Topology.of(recipe.trainer).model_ranks * strategy.expert_model_parallel_size
    ):
        strategy.tensor_model_parallel_size, strategy.sequence_parallel = 1, False
        strategy.pipeline_model_parallel_size, strategy.virtual_pipeline_model_parallel_size = 1, None
    for name, value in settings.items():
        setattr(recipe.trainer.plugins, name, value)
    recipe.trainer.plugins.fp8_param_gather = bool(settings)
    recipe.data.global_batch_size = 1024
    preflight(recipe, None)  # whether it fits is another question: every layout is built
    return recipe, hardware


def dims_of(config: Any, topology: Topology) -> ModelShape:
    shape = ModelShape.of(config)
    return dataclasses.replace(shape, vocab_size=shape.padded_vocab_size(topology.tensor_model_parallel_size))


def expected_parameters(chunk: Any, topology: Topology, *, fused: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter this chunk should have, from the mapping alone."""
    dims = dims_of(chunk.config, topology)
    found = {}
    experts = range(dims.num_moe_experts // topology.expert_model_parallel_size)
    for weight in WEIGHTS:
        if weight.disk.startswith("embedding") and not chunk.pre_process:
            continue
        if weight.disk.startswith(("output_layer", "decoder.final")) and not chunk.post_process:
            continue
        template = te_name(weight, fused=fused)
        for layer in range(len(chunk.decoder.layers)) if weight.per_layer else (None,):
            for expert in experts if weight.per_expert else (None,):
                found[template.format(layer=layer, expert=expert)] = local_shape(weight, dims, topology)
    return found


def te_name(weight: Weight, *, fused: bool) -> str:
    """A parameter's name in Transformer Engine's modules; fused, linear_qkv has the norm before it."""
    name = weight.disk.replace("decoder.layers.", "decoder.layers.{layer}.")
    if weight.per_expert:
        name = name.replace("experts.experts.", "experts.") + "{expert}"
    return name if fused else name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")


def local_shape(weight: Weight, dims: ModelShape, topology: Topology) -> tuple[int, ...]:
    """Of one layer and expert, what one tensor-parallel rank holds."""
    rows = sum(block.stop - block.start for block in merge_blocks(weight, dims, 0, 0))
    shape = [rows, *shape_of(weight.shapes[0], dims)[1:]]
    axis = next((axis for name, axis in SPLIT_AXES.items() if weight.disk.endswith(name)), None)
    if axis is not None:
        shape[axis] //= topology.expert_tp if weight.per_expert else topology.tensor_model_parallel_size
    return tuple(shape)


def check_chunk(chunk: Any, topology: Topology, *, adapters: bool) -> None:
    parameters = {name: p for name, p in chunk.named_parameters() if ".adapter." not in name}
    assert all(parameter.is_meta for parameter in parameters.values())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert shapes == expected_parameters(chunk, topology, fused=not adapters)
    states = check_checkpoint(chunk, topology)
    last = "decoder.final_layernorm._extra_state"
    if not adapters:
        every = {weight.extra_state for weight in WEIGHTS if weight.extra_state}
        assert states == every - (set() if chunk.post_process else {last})


def check_checkpoint(chunk: Any, topology: Topology) -> set[str]:
    """Where this chunk's tensors lie in a checkpoint is where the mapping says the model's do; its states' keys."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    dims = dims_of(chunk.config, topology)
    rows = {weight.disk: weight for weight in WEIGHTS}
    seen, states = set(), set()
    for entry in leaves(chunk.on_disk):
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        for part in leaves(entry):
            if isinstance(part, ShardedObject):
                states.add(part.key)
                continue
            if ".adapter." in part.key:
                continue
            assert isinstance(part, ShardedTensor), part
            assert tuple(part.global_shape) == disk_shape(rows[part.key], dims), part.key
            seen.add(part.key)
    absent = {key for key in rows if key.startswith("embedding") and not chunk.pre_process}
    absent |= {key for key in rows if key.startswith(("output_layer", "decoder.final")) and not chunk.post_process}
    assert seen == set(rows) - absent
    return states


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [8, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_pretraining(build_rank: BuildRank, size: str, world: int, precision: str) -> None:
    recipe, hardware = pretraining(size, world, precision)
    topology = Topology.of(recipe.trainer)
    assert topology.world_size == world
    for rank in (0, world - 1):
        chunks = build_rank(recipe, rank, hardware)
        assert len(chunks) == (topology.virtual_pipeline_model_parallel_size or 1)
        for chunk in chunks:
            check_chunk(chunk, topology, adapters=False)
        layers = sum(len(chunk.decoder.layers) for chunk in chunks)
        assert layers == recipe.model.config.num_layers // topology.pipeline_model_parallel_size
        assert chunks[0].pre_process == (rank == 0 or topology.pipeline_model_parallel_size == 1)
        assert chunks[-1].post_process == (rank == world - 1 or topology.pipeline_model_parallel_size == 1)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("task", ["lora", "dora", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_finetuning(build_rank: BuildRank, size: str, task: str, precision: str) -> None:
    """The recipes as they are, adapters included: under adapters the norms stand apart from linear_qkv."""
    from mixtral_recipes.peft.attach import adapters_of

    recipe = loading.load(size, "finetune", peft_scheme=task, precision=precision)
    topology = Topology.of(recipe.trainer)
    for rank in (0, topology.world_size - 1):
        chunks = build_rank(recipe, rank, "h100")
        adapters = adapters_of(chunks)
        assert bool(adapters) == (task != "none")
        for chunk in chunks:
            check_chunk(chunk, topology, adapters=task != "none")
        experts = recipe.model.config.num_moe_experts // topology.expert_model_parallel_size
        layers = sum(len(chunk.decoder.layers) for chunk in chunks)
        assert len(adapters) in (0, layers * 4)
        each = [one for found in adapters for one in getattr(found, "experts", {0: found}).values()]
        assert len(each) in (0, layers * (2 + 2 * experts))
        assert len({one.layer_name for one in each}) == len(each), "each expert of a grouped layer has its own"


def test_layers_are_transformer_engines(build_rank: BuildRank) -> None:
    """Grouped experts, a fused norm, its attention, and every switch of the table."""
    from mixtral_recipes.models.acceleration import KNOBS

    recipe, hardware = pretraining("mixtral_8x7b", 64, "blockwise")
    (chunk, *_) = build_rank(recipe, 0, hardware)
    layer = chunk.decoder.layers[0]
    kinds = {
        "linear_qkv": layer.self_attention.linear_qkv,
        "core_attention": layer.self_attention.core_attention,
        "linear_proj": layer.self_attention.linear_proj,
        "linear_fc1": layer.mlp.experts.linear_fc1,
        "linear_fc2": layer.mlp.experts.linear_fc2,
    }
    assert {name: type(module).__name__ for name, module in kinds.items()} == {
        "linear_qkv": "TELayerNormColumnParallelLinear",
        "core_attention": "TEDotProductAttention",
        "linear_proj": "TERowParallelLinear",
        "linear_fc1": "TEColumnParallelGroupedLinear",
        "linear_fc2": "TERowParallelGroupedLinear",
    }
    for knob in KNOBS:
        assert getattr(chunk.config, knob.field) == knob.value, knob.field
    fused = {name: m.fuse_wgrad_accumulation for name, m in kinds.items() if name != "core_attention"}
    assert all(fused.values()), fused
    (*_, last) = build_rank(recipe, 63, hardware)
    assert last.output_layer.gradient_accumulation_fusion
    assert (chunk.config.fp8, str(chunk.config.fp8_recipe)) == ("e4m3", "blockwise")


def test_accelerate_false_leaves_the_fields_alone(build_rank: BuildRank) -> None:
    recipe, hardware = pretraining("mixtral_8x7b", 64, "bf16")
    recipe.model.config.accelerate = False
    recipe.model.config.moe_grouped_gemm = False
    (chunk, *_) = build_rank(recipe, 0, hardware)
    assert not chunk.config.moe_permute_fusion
    assert "local_experts.0.linear_fc1.weight" in "".join(name for name, _ in chunk.named_parameters())


def test_a_field_that_is_given_is_left_alone_by_itself(build_rank: BuildRank) -> None:
    recipe, hardware = pretraining("mixtral_8x7b", 64, "bf16")
    recipe.model.config.apply_rope_fusion = False
    (chunk, *_) = build_rank(recipe, 0, hardware)
    assert not chunk.config.apply_rope_fusion
    assert chunk.config.moe_permute_fusion


@pytest.mark.parametrize(
    ("fp8_recipe", "has", "needs"), [("mxfp8", "h100", "Blackwell"), ("delayed", "a100", "Hopper")]
)
def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, fp8_recipe: str, has: str, needs: str) -> None:
    from mixtral_recipes.errors import RecipeError
    from mixtral_recipes.settings.precision import MegatronMixedPrecision

    pretend_gpu(monkeypatch, has)
    with pytest.raises(RecipeError, match=f"needs {needs}.*this machine has {has.upper()}"):
        check_device(MegatronMixedPrecision(fp8="hybrid", fp8_recipe=fp8_recipe))


def test_attention_is_deterministic_where_that_is_asked_for(
    build_rank: BuildRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")  # what it is without a word
    recipe, hardware = pretraining("mixtral_8x7b", 8, "bf16")
    for asked in (False, True):
        recipe.model.config.deterministic_mode = asked
        (chunk,) = build_rank(recipe, 0, hardware)[:1]
        assert chunk.decoder.layers[0].self_attention.core_attention.deterministic is asked
