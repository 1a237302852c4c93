"""Every size and precision builds from Transformer Engine's modules at 8 to 1024 GPUs, and fits the checkpoints.

First and last rank (first and last pipeline stage); parameter names and shapes, and where each part lies in a
checkpoint, are compared with the mapping that import and export read.
"""

from typing import Any

import pytest

from mixtral_recipes.importers.mapping import EXTRA_STATES, WEIGHTS, Dims, Weight, disk_shape, merge_blocks, shape_of
from mixtral_recipes.recipes import loading
from mixtral_recipes.recipes.preflight import preflight, topology_of
from mixtral_recipes.topology import Topology
from tests.te.conftest import BuildRank

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning")

FUSED_NORM = "self_attention.linear_qkv.layer_norm_"
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


def pretraining(size: str, world: int, precision: str) -> tuple[Any, str]:
    """The pretraining recipe on so many GPUs; on fewer than its layout needs, with every stage on one rank."""
    settings, hardware = PRECISIONS[precision]
    recipe = loading.load(size, "pretrain", num_nodes=world // 8, num_gpus_per_node=8)
    strategy = recipe.trainer.strategy
    if topology_of(recipe).world_size < topology_of(recipe).model_ranks * strategy.expert_model_parallel_size:
        strategy.tensor_model_parallel_size, strategy.sequence_parallel = 1, False
        strategy.pipeline_model_parallel_size, strategy.virtual_pipeline_model_parallel_size = 1, None
    for name, value in settings.items():
        setattr(recipe.trainer.plugins, name, value)
    recipe.trainer.plugins.fp8_param_gather = bool(settings)
    recipe.data.global_batch_size = 1024
    preflight(recipe)
    return recipe, hardware


def dims_of(config: Any, topology: Topology) -> Dims:
    vocab = -(-config.vocab_size // (128 * topology.tensor_model_parallel_size))
    return Dims(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        num_moe_experts=config.num_moe_experts,
        vocab_size=vocab * 128 * topology.tensor_model_parallel_size,
    )


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
        template = (
            weight.fused if fused else weight.fused.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        )
        for layer in range(len(chunk.decoder.layers)) if weight.per_layer else (None,):
            for expert in experts if weight.per_expert else (None,):
                found[template.format(layer=layer, expert=expert)] = local_shape(weight, dims, topology)
    return found


def local_shape(weight: Weight, dims: Dims, topology: Topology) -> tuple[int, ...]:
    """Of one layer and expert, what one tensor-parallel rank holds."""
    rows = sum(block.stop - block.start for block in merge_blocks(weight, dims, 0, 0))
    shape = [rows, *shape_of(weight.shapes[0], dims)[1:]]
    if weight.tensor_axis is not None:
        shape[weight.tensor_axis] //= topology.expert_tp if weight.per_expert else topology.tensor_model_parallel_size
    return tuple(shape)


def check_chunk(chunk: Any, topology: Topology, *, adapters: bool) -> None:
    parameters = {name: p for name, p in chunk.named_parameters() if ".adapter." not in name}
    assert all(parameter.is_meta for parameter in parameters.values())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert shapes == expected_parameters(chunk, topology, fused=not adapters)
    check_checkpoint(chunk, topology)


def check_checkpoint(chunk: Any, topology: Topology) -> None:
    """Where this chunk's tensors lie in a checkpoint is where the mapping says the model's do."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    dims = dims_of(chunk.config, topology)
    rows = {weight.disk: weight for weight in WEIGHTS}
    seen = set()
    for entry in leaves(chunk.on_disk):
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        for part in leaves(entry):
            if isinstance(part, ShardedObject):
                assert part.key in EXTRA_STATES, part.key
                continue
            assert isinstance(part, ShardedTensor), part
            assert tuple(part.global_shape) == disk_shape(rows[part.key], dims), part.key
            seen.add(part.key)
    absent = {key for key in rows if key.startswith("embedding") and not chunk.pre_process}
    absent |= {key for key in rows if key.startswith(("output_layer", "decoder.final")) and not chunk.post_process}
    assert seen == set(rows) - absent


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
    topology = topology_of(recipe)
    assert topology.world_size == world
    for rank in (0, world - 1):
        chunks = build_rank(recipe, rank, hardware)
        assert len(chunks) == (topology.virtual_pipeline_model_parallel_size or 1)
        for chunk in chunks:
            check_chunk(chunk, topology, adapters=False)
        layers = sum(len(chunk.decoder.layers) for chunk in chunks)
        assert layers == recipe.model.config.num_layers // topology.pipeline_model_parallel_size
        assert chunks[0].pre_process == (rank == 0)
        assert chunks[-1].post_process == (rank == world - 1 or topology.pipeline_model_parallel_size == 1)
