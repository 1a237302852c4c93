"""Transformer Engine's user buffers: tensor-parallel communication in pieces, beside the products that need it.

Off unless ``model.config.tp_comm_overlap`` or `MegatronCommOverlapCallback` asks for it. It takes GPUs of one node that
NVLink joins, and microbatches of one length.
"""

from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.models.kernels import INSTALL, transformer_engine_usable


def check(topology: Topology) -> None:
    """Refuse them where there is nothing to overlap.

    Raises:
        RecipeError: names what is missing.
    """
    if topology.tensor_model_parallel_size == 1 or not topology.sequence_parallel:
        raise RecipeError(
            "tp_comm_overlap=True overlaps the communication of tensor parallelism with sequence parallelism, but "
            f"trainer.strategy has tensor_model_parallel_size={topology.tensor_model_parallel_size} and "
            f"sequence_parallel={topology.sequence_parallel}; set both, or leave tp_comm_overlap out."
        )


def start(config: MixtralConfig, batch: BatchShape) -> None:
    """Set them up, once the groups exist and before the first step; all ranks together.

    Args:
        config: The model's, parallel sizes and precision filled in.
        batch: The shape of a microbatch, which every one has.

    Raises:
        RecipeError: Transformer Engine does not run here.

    Source: Megatron-LM `megatron/training/initialize.py`, ``_initialize_tp_communicators``.
    """
    if not transformer_engine_usable():
        raise RecipeError(f"tp_comm_overlap=True needs Transformer Engine, which is not installed: {INSTALL}")
    from transformer_engine.pytorch.module import base  # pyright: ignore[reportMissingImports]

    tokens = batch.seq_length * batch.micro_batch_size // config.context_parallel_size
    base.destroy_ub()  # an earlier run's in this process
    base.initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=config.tensor_model_parallel_size,
        quantization_modes=_modes(config, base.UserBufferQuantizationMode),
        dtype=config.params_dtype,
        ub_cfgs={},
        bootstrap_backend=config.tp_comm_bootstrap_backend,
    )


def _modes(config: MixtralConfig, kinds: Any) -> list[Any]:
    """A buffer for FP8 layers, and one for those that compute in bf16."""
    in_16_bits = config.num_layers_at_start_in_bf16 or config.num_layers_at_end_in_bf16
    if not config.fp8:
        return [kinds.NONE]
    return [kinds.FP8, kinds.NONE] if config.first_last_layers_bf16 and in_16_bits else [kinds.FP8]
