"""Trainer and strategy: how long a run is and how it is laid out, in NeMo's spelling."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig

from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.settings.precision import MegatronMixedPrecision


@takes_nemos_arguments
@dataclass
class MegatronStrategy:
    """Parallel layout and related settings.

    Attributes:
        tensor_model_parallel_size: Ranks that share each matrix.
        pipeline_model_parallel_size: Consecutive groups of layers.
        virtual_pipeline_model_parallel_size: Interleaved chunks per pipeline rank.
        pipeline_dtype: No effect: pipeline stages send each other the dtype of ``trainer.plugins.precision``.
        context_parallel_size: Ranks that share each sequence.
        sequence_parallel: Whether tensor-parallel ranks split the sequence.
        expert_model_parallel_size: Ranks the experts are spread over.
        expert_tensor_parallel_size: Ranks that share each expert's matrices; None means the tensor-parallel size.
        gradient_as_bucket_view: No effect: Megatron's DDP always keeps gradients in its buckets.
        ckpt_async_save: Whether checkpoints are written in the background.
        ckpt_parallel_load: No effect: every rank reads its own part of a checkpoint.
        ckpt_load_strictness: No effect: a checkpoint that lacks a tensor of the model is refused.
        ddp: Megatron's DDP settings; ``"megatron"``, NeMo's default, means their defaults.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    pipeline_dtype: torch.dtype | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    gradient_as_bucket_view: bool = True
    ckpt_async_save: bool = False
    ckpt_parallel_load: bool = False
    ckpt_load_strictness: str | None = None
    ddp: DistributedDataParallelConfig | Literal["megatron"] = field(default_factory=DistributedDataParallelConfig)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def __post_init__(self) -> None:
        if self.ddp == "megatron":
            self.ddp = DistributedDataParallelConfig()


@takes_nemos_arguments
@dataclass
class Trainer:
    """How long to train, on how many processes, and how often to validate and log.

    Attributes:
        accelerator: ``"gpu"`` needs CUDA devices; ``"cpu"`` runs on the CPU; ``"auto"`` uses a GPU if there is one.
        devices: Processes per node.
        num_nodes: Nodes.
        max_steps: Optimizer steps.
        val_check_interval: Steps between validations; 0 never validates.
        limit_val_batches: Global batches per validation; None uses the whole set.
        limit_test_batches: No effect: there is no test loop.
        log_every_n_steps: Steps between log lines.
        enable_checkpointing: Whether checkpoints are written at all; without them, a stopped run starts over.
        accumulate_grad_batches: Must be 1: gradient accumulation follows from global_batch_size.
        use_distributed_sampler: No effect: every data-parallel rank reads its own share of the data.
        strategy: Parallel layout.
        plugins: Precision.
        callbacks: Small objects whose hooks the loop calls.
        seed: Seed of initialisation, data order and dropout.
        max_skipped_steps: How many steps with a loss or gradient that is not finite are skipped before the run stops; 0
            stops at the first.
        hang_timeout_seconds: How long a rank may make no progress before it is stopped with its stacks; must exceed the
            longest step, validation batch or save.
    """

    accelerator: str = "gpu"
    devices: int = 1
    num_nodes: int = 1
    max_steps: int = 1000
    val_check_interval: int = 0
    limit_val_batches: int | None = None
    limit_test_batches: int | None = None
    log_every_n_steps: int = 10
    enable_checkpointing: bool = True
    accumulate_grad_batches: int = 1
    use_distributed_sampler: bool = False
    strategy: MegatronStrategy = field(default_factory=MegatronStrategy)
    plugins: MegatronMixedPrecision = field(default_factory=MegatronMixedPrecision)
    callbacks: list[Any] | None = None
    seed: int = 1234  # Megatron's default
    max_skipped_steps: int = 0
    hang_timeout_seconds: float = 1800.0  # torch.distributed's default for gloo's collectives

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    def topology(self) -> Topology:
        """The layout this trainer asks for."""
        return Topology.of(self)
