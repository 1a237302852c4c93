"""From configs to a run that can step: model, DDP, optimizer and schedule on this rank."""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mixtral_recipes.checkpoints.load import load_model
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.layout import repair
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.acceleration import accelerate
from mixtral_recipes.models.builder import build_model, transformer_engine_usable, with_topology
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.peft import attach
from mixtral_recipes.peft.adapter import reduce_expert_adapter_gradients
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training import precision
from mixtral_recipes.training.optimizer import build_optimizer, build_scheduler
from mixtral_recipes.training.watch import callbacks


@dataclass
class TrainingRun:
    """Everything a step needs, on this rank.

    Attributes:
        trainer: The recipe's trainer.
        topology: The layout.
        config: The model's configuration with parallel sizes and precision filled in.
        model: Model chunks as built (no DDP).
        ddp: The same chunks wrapped by Megatron's DDP.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's schedule.
        data: The data module, set up.
        device: Where tensors live.
        forward_backward: Megatron's schedule for this layout.
        batch: Batch shape.
    """

    trainer: Trainer
    topology: Topology
    config: MixtralConfig
    model: list[Any]
    ddp: list[Any]
    optimizer: Any
    scheduler: Any
    data: DataModule
    device: torch.device
    forward_backward: Any
    batch: BatchShape

    def gather_parameters(self) -> None:
        """Bring all weights on this rank up to date, for whatever looks at them between two steps.

        With ``ddp.overlap_param_gather`` a rank holds what it updated itself, and gets the rest in its next forward
        pass.
        """
        if not self.ddp[0].ddp_config.overlap_param_gather:
            return
        with torch.no_grad():
            self.optimizer.prepare_model_params_for_param_sync()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    @property
    def data_place(self) -> DataParallelPlace:
        """Which share of each global batch this rank reads."""
        return DataParallelPlace(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())

    @property
    def loader_shape(self) -> dict[str, Any]:
        """How long microbatches are: a multiple of what splits them; fixed where pipeline stages exchange them."""
        t = self.topology
        chunks = 2 * t.context_parallel_size if t.context_parallel_size > 1 else 1
        # FP8 products want a multiple of 16 tokens on each rank, MXFP8 of 32.
        tokens = self.trainer.plugins.token_multiple * t.context_parallel_size * t.tensor_model_parallel_size
        return {
            "multiple": math.lcm(8, tokens, chunks * t.tensor_model_parallel_size),
            # Context parallelism splits each sequence of a pack, not the pack.
            "sequence_multiple": chunks,
            "fixed": t.pipeline_model_parallel_size > 1,
        }


def check_layout(model: MixtralModel, trainer: Trainer, data: DataModule) -> None:
    """Refuse a recipe whose layout cannot run, before anything is built.

    Raises:
        RecipeError: all broken rules at once.
    """
    batch = BatchShape.of(data, fp8=bool(trainer.plugins.fp8))
    repair.check_layout(trainer.topology(), ModelShape.of(model.config), batch)


def build_run(
    model: MixtralModel,
    trainer: Trainer,
    data: DataModule,
    optim: MegatronOptimizerModule,
    *,
    device: torch.device,
    peft: LoRA | None = None,
    weights: Path | None = None,
) -> TrainingRun:
    """Build this rank's part of a run. Megatron's groups must exist.

    Args:
        model: What to train.
        trainer: How.
        data: On what; already set up.
        optim: Optimizer and schedule.
        device: Where.
        peft: Adapters to train instead of the weights.
        weights: Checkpoint folder to take the model's weights from; None keeps the random start.
    """
    topology = trainer.topology()
    settings = _settings(trainer, topology, device)
    callbacks.call(trainer.callbacks, "configure", settings)
    precision.check_device(trainer.plugins)
    config = with_topology(model.config, topology, **settings["model"])
    if transformer_engine_usable():
        config = accelerate(config, adapters=peft is not None)
    chunks = build_model(config, adapters=peft is not None)
    if weights is not None:
        load_model(chunks, weights)
    if peft is not None:
        attach.apply(peft, chunks)
    ddp_config = _ddp_config(trainer, optim, settings["ddp"])
    settings["optimizer"]["overlap_param_gather"] = ddp_config.overlap_param_gather
    optim = dataclasses.replace(optim, config=dataclasses.replace(optim.config, **settings["optimizer"]))
    ddp = _wrap(chunks, config, ddp_config)
    optimizer = build_optimizer(optim, ddp, trainer.plugins)
    _connect(config, ddp, optimizer)
    return TrainingRun(
        trainer=trainer,
        topology=topology,
        config=config,
        model=chunks,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=build_scheduler(optim, optimizer, trainer.max_steps),
        data=data,
        device=device,
        forward_backward=get_forward_backward_func(),
        batch=BatchShape.of(data, fp8=bool(trainer.plugins.fp8)),
    )


def _settings(trainer: Trainer, topology: Topology, device: torch.device) -> dict[str, dict[str, Any]]:
    """Fields of Megatron's three configs that follow from the run; callbacks may change them."""
    model = precision.model_fields(trainer.plugins) | {
        # The loss is a sum over label tokens, divided once by the global batch's count of them.
        "calculate_per_token_loss": True,
    }
    if trainer.strategy.pipeline_dtype is not None:
        model["pipeline_dtype"] = trainer.strategy.pipeline_dtype
    if topology.pipeline_model_parallel_size == 1:
        model["pipeline_dtype"] = None
    if topology.virtual_pipeline_model_parallel_size:
        # Batched sends need three pipeline ranks: with two, both neighbours are the same rank and messages cross.
        model |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return {
        "model": model,
        "ddp": precision.ddp_fields(trainer.plugins),
        "optimizer": {},
        "run": {"topology": topology, "device": device},
    }


def _ddp_config(
    trainer: Trainer, optim: MegatronOptimizerModule, fields: dict[str, Any]
) -> DistributedDataParallelConfig:
    given = trainer.strategy.ddp
    if given.average_in_collective:
        warnings.warn(
            "trainer.strategy.ddp.average_in_collective=True is ignored: gradients are summed and divided by the "
            "global batch's label tokens.",
            stacklevel=2,
        )
    return dataclasses.replace(
        given,
        **fields,
        use_distributed_optimizer=optim.config.use_distributed_optimizer,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # the loop checks loss and gradient norm itself, and names the step
    )


def _wrap(chunks: list[Any], config: MixtralConfig, ddp_config: DistributedDataParallelConfig) -> list[Any]:
    """Cast outputs back to fp32 where weights are 16-bit, and wrap in Megatron's DDP."""
    low = config.bf16 or config.fp16
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=Float16Module(config, chunk) if low else chunk,
            # Interleaved chunks after the first are reduced when their turn comes, not bucket by bucket.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def _finalize_gradients(ddp: list[Any], num_tokens: Tensor | None = None, **named: Any) -> None:
    """Reduce all gradients over the ranks that share a parameter, and divide by the global batch's label tokens."""
    finalize_model_grads(ddp, num_tokens, **named)
    reduce_expert_adapter_gradients(ddp)


def _connect(config: Any, ddp: list[Any], optimizer: Any) -> None:
    """Give Megatron's schedules, through its config, the hooks they call."""
    single = len(ddp) == 1
    config.finalize_model_grads_func = _finalize_gradients
    config.grad_scale_func = optimizer.scale_loss
    ddp_config = ddp[0].ddp_config
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = ddp[0].no_sync if single else [chunk.no_sync for chunk in ddp]
        if ddp_config.align_param_gather:
            config.grad_sync_func = ddp[0].start_grad_sync if single else [c.start_grad_sync for c in ddp]
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = ddp[0].start_param_sync if single else [c.start_param_sync for c in ddp]
