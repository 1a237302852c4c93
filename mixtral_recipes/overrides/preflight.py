"""Checks of a whole recipe before anything is built or queued."""

from typing import Any

import fiddle as fdl

from mixtral_recipes.layout.topology import BatchShape, ModelShape, Topology
from mixtral_recipes.training.watch import callbacks


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
        RecipeError: every broken rule of the layout and the nearest one that breaks none; or a setting that no machine
            runs (precision, overlap).
    """
    topology = topology_of(recipe)
    topology.check(ModelShape.of(recipe.model.config), batch_of(recipe))
    plugins: Any = fdl.build(recipe.trainer.plugins)
    plugins.check()
    checked = [fdl.build(c) for c in recipe.trainer.callbacks or [] if hasattr(getattr(c, "__fn_or_cls__", c), "check")]
    callbacks.call(checked, "check", topology)
