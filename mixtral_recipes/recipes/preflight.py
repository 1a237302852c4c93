"""Checks of a whole recipe before anything is built or queued."""

from typing import Any

from mixtral_recipes.topology import BatchShape, ModelShape, Topology


def topology_of(recipe: Any) -> Topology:
    """The layout a recipe asks for."""
    trainer, strategy = recipe.trainer, recipe.trainer.strategy
    return Topology(
        world_size=trainer.num_nodes * trainer.devices,
        tensor_model_parallel_size=strategy.tensor_model_parallel_size,
        pipeline_model_parallel_size=strategy.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=strategy.virtual_pipeline_model_parallel_size,
        context_parallel_size=strategy.context_parallel_size,
        expert_model_parallel_size=strategy.expert_model_parallel_size,
        expert_tensor_parallel_size=strategy.expert_tensor_parallel_size,
        sequence_parallel=strategy.sequence_parallel,
    )


def batch_of(recipe: Any) -> BatchShape:
    """The recipe's batch."""
    data = recipe.data
    specs = getattr(data, "packed_sequence_specs", None)
    return BatchShape(
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        seq_length=data.seq_length,
        packed=specs is not None and specs.packed_sequence_size > 0,
        fp8=bool(recipe.trainer.plugins.fp8),
    )


def preflight(recipe: Any) -> None:
    """Refuse a recipe that cannot run.

    Raises:
        RecipeError: every broken rule, and the nearest layout that breaks none.
    """
    topology_of(recipe).check(ModelShape.of(recipe.model.config), batch_of(recipe))
