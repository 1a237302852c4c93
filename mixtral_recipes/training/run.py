"""A run that can step: model, optimizer and data on this rank, built from settings."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mixtral_recipes.checkpoints.fp8 import forget_first_values
from mixtral_recipes.checkpoints.load import load_model
from mixtral_recipes.checkpoints.quantized_cache import cache_folder
from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models import kernel_choice, kernels
from mixtral_recipes.models.acceleration import accelerated, refuse_without
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, MixtralModel, with_topology
from mixtral_recipes.models.kernels import Kernels
from mixtral_recipes.peft import attach
from mixtral_recipes.peft.quantized.layers import base_format
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA, QLoRA
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training import precision, user_buffers
from mixtral_recipes.training.model import megatron_settings, refusals_told
from mixtral_recipes.training.optimizer import build_optimizer, build_scheduler, connect, ddp_config, wrap
from mixtral_recipes.training.states import check_states


@dataclass
class TrainingRun:
    """Everything a step needs, on this rank.

    Attributes:
        trainer: The recipe's trainer.
        topology: The layout.
        config: The model's configuration with parallel sizes and precision filled in.
        model: Model chunks as built (no DDP).
        ddp: The same chunks wrapped by Megatron's DDP.
        optimizer: Megatron's optimizer; None where nothing is trained.
        scheduler: Megatron's schedule; likewise.
        data: The data module, set up.
        device: Where tensors live.
        forward_backward: Megatron's schedule for this layout.
        batch: Batch shape.
        computed_by: The kernels it runs on; None on a CPU.
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
    computed_by: Kernels | None = None

    def gather_parameters(self) -> None:
        """Bring all weights on this rank up to date, for whatever looks at them between two steps.

        With ``ddp.overlap_param_gather`` a rank holds what it updated itself, and gets the rest in its next forward
        pass.
        """
        if self.optimizer is None or not self.ddp[0].ddp_config.overlap_param_gather:
            return
        with torch.no_grad():
            self.optimizer.prepare_model_params_for_param_sync()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def take_up_main_weights(self) -> None:
        """Quantize weights kept in FP8 from the optimizer's fp32 ones, as the step before a checkpoint did.

        A checkpoint has such weights in bf16, which quantized again need not give the same bits. An optimizer that
        keeps its weights in two halves has set its share of the model's; the ranks gather the others'.
        """
        if self.optimizer is None:
            return
        how = self.ddp[0].ddp_config
        halves = any(part.config.use_precision_aware_optimizer for part in parts_of(self.optimizer))
        if not (how.fp8_param_gather or halves):
            return
        with torch.no_grad():
            for part in parts_of(self.optimizer):
                if how.reuse_grad_buf_for_mxfp8_param_ag:
                    part._copy_main_params_to_param_buffer()
                else:
                    part._copy_main_params_to_model_params()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    @property
    def data_place(self) -> DataParallelPlace:
        """Which share of each global batch this rank reads."""
        return DataParallelPlace(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())

    @property
    def loader_shape(self) -> dict[str, Any]:
        """How long microbatches are: a multiple of what splits them; fixed where one shape is needed."""
        t = self.topology
        # On a GPU cuDNN plans its attention anew for each length: few lengths, for some more padding.
        rows = 64 if self.device.type == "cuda" else 8
        # FP8 products want a multiple of 16 tokens on each rank, MXFP8 of 32.
        tokens = self.trainer.plugins.token_multiple * t.context_parallel_size * t.tensor_model_parallel_size
        return {
            "multiple": math.lcm(rows, tokens, t.context_slices * t.tensor_model_parallel_size),
            # Context parallelism splits each sequence of a pack, not the pack.
            "sequence_multiple": t.context_slices,
            # Pipeline stages exchange tensors of one shape, and so do user buffers.
            "fixed": t.pipeline_model_parallel_size > 1 or self.config.tp_comm_overlap,
        }


def build_run(
    model: MixtralModel,
    trainer: Trainer,
    data: DataModule,
    optim: MegatronOptimizerModule,
    *,
    device: torch.device,
    peft: LoRA | None = None,
    weights: Path | None = None,
    new_rows: range = range(0),
    adapters: Path | None = None,
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
        new_rows: Tokens that checkpoint has no row for (`load_model`).
        adapters: Adapter checkpoint to take the adapters from, likewise.
    """
    topology = trainer.topology()
    trainer = dataclasses.replace(
        trainer, plugins=precision.decided(trainer.plugins, topology, frozen=peft is not None)
    )
    settings = megatron_settings(trainer, topology, device, frozen=peft is not None)
    precision.check_device(trainer.plugins)
    config = _configured(model.config, topology, settings["model"], peft, weights)
    if isinstance(peft, QLoRA):
        peft.check_base(trainer.plugins, ModelShape.of(config), topology)
    assert not isinstance(trainer.strategy.ddp, str)  # a strategy that is built has none
    with refusals_told("trainer.strategy.ddp"):
        reduction = ddp_config(trainer.strategy.ddp, optim, settings["ddp"])
    batch = BatchShape.of(data, fp8=bool(trainer.plugins.fp8))
    if config.tp_comm_overlap:
        user_buffers.start(config, batch)
    if kernels.transformer_engine_usable():
        kernel_choice.apply(config)
    computed_by = kernels.in_use(config, length=batch.seq_length, packed=batch.packed)
    chunks = _loaded(config, peft, device, weights=weights, new_rows=new_rows, adapters=adapters)
    check_states(optim, trainer.plugins, frozen=peft is not None)
    ddp = wrap(chunks, config, reduction)
    settings["optimizer"]["overlap_param_gather"] = ddp[0].ddp_config.overlap_param_gather
    optim = dataclasses.replace(optim, config=dataclasses.replace(optim.config, **settings["optimizer"]))
    optimizer = build_optimizer(optim, ddp, trainer.plugins, peft)
    connect(config, ddp, optimizer)
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
        batch=batch,
        computed_by=computed_by,
    )


def _configured(
    config: MixtralConfig, topology: Topology, settings: dict[str, Any], peft: LoRA | None, weights: Path | None
) -> MixtralConfig:
    """The model's configuration with parallel sizes, precision, and what makes it faster on a GPU."""
    base = base_format(peft)
    fast: dict[str, Any] = {}
    on_transformer_engine = kernels.transformer_engine_usable()
    if torch.cuda.is_available():
        fast = accelerated(
            config,
            adapters=peft is not None,
            quantized=base is not None,
            dtype=settings["params_dtype"],
            transformer_engine=on_transformer_engine,
        )
    if not (on_transformer_engine and fast.get("moe_grouped_gemm", config.moe_grouped_gemm)):
        refuse_without(config, grouped_only=on_transformer_engine)
    if weights is not None:
        fast["use_cpu_initialization"] = False  # it is about which random weights are drawn
        if base is not None:
            fast["perform_initialization"] = False  # none are where others are quantised
    with refusals_told():
        return with_topology(config, topology, **(settings | fast))


def _loaded(
    config: MixtralConfig,
    peft: LoRA | None,
    device: torch.device,
    *,
    weights: Path | None,
    new_rows: range,
    adapters: Path | None,
) -> list[Any]:
    """The model's chunks, with adapters where there are some, and the weights of both."""
    base = base_format(peft)
    chunks = build_model(config, adapters=peft is not None, base=base)
    if weights is not None:
        cache = cache_folder(weights, base, device) if isinstance(peft, QLoRA) and peft.cache and base else None
        load_model(chunks, weights, new_rows=new_rows, cache=cache)
    if peft is not None:
        attach.apply(peft, chunks)
        forget_first_values(chunks)
    if adapters is not None:
        load_model(chunks, adapters, adapters_only=True)
    return chunks
