"""The trainer all recipes share, and their number formats; values are NeMo 2.0's where nothing else is said.

Logging is in `log/default.py`, the optimizer in `optim/adam.py`, number formats in `precision/mixed_precision.py`,
fine-tuning in `finetune_default.py`, where NeMo has them.
"""

from typing import Any

import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.recipes.precision.mixed_precision import (
    bf16_mixed,
    bf16_with_fp8_mixed,
    bf16_with_mxfp8_mixed,
    fp32,
)
from mixtral_recipes.settings import serialization as _serialization  # noqa: F401  # teaches nemo_run dtypes, X | None
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training.watch.callbacks import TimingCallback


def trainer(
    topology: Topology,
    *,
    num_nodes: int,
    num_gpus_per_node: int,
    max_steps: int,
    pipeline_dtype: torch.dtype | None = torch.bfloat16,
    callbacks: list[Any] | None = None,
) -> run.Config[Trainer]:
    """A pretraining trainer.

    Args:
        topology: The parallel sizes; its world size is not read.
        num_nodes: Nodes.
        num_gpus_per_node: Processes per node.
        max_steps: Optimizer steps.
        pipeline_dtype: Dtype sent between pipeline stages.
        callbacks: Callback configs; None uses `TimingCallback`.
    """
    strategy = run.Config(
        MegatronStrategy,
        **topology.settings(),
        pipeline_dtype=pipeline_dtype,
        gradient_as_bucket_view=True,
        ckpt_async_save=True,
        ckpt_parallel_load=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            # NeMo has True. The loop divides the summed gradient by the label tokens of the global batch, which an
            # average taken inside the collective would contradict.
            average_in_collective=False,
        ),
    )
    return run.Config(
        Trainer,
        accelerator="gpu",
        accumulate_grad_batches=1,
        callbacks=callbacks if callbacks is not None else [run.Config(TimingCallback)],
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        max_steps=max_steps,
        limit_test_batches=50,
        limit_val_batches=32,
        val_check_interval=2000,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        plugins=bf16_mixed(),
        strategy=strategy,
    )


def set_precision(recipe: run.Partial, precision: str, choices: tuple[str, ...], hardware: str) -> None:
    """Put a precision choice into a recipe.

    Args:
        recipe: The recipe to change.
        precision: ``bf16``, ``fp8`` or ``fp32``.
        choices: The precisions that the recipe supports.
        hardware: A card's name (`layout/cards.py`).

    Raises:
        RecipeError: a precision that the recipe does not support.
    """
    if precision not in choices:
        raise RecipeError(f"precision={precision!r} is not supported.{nearest(precision, choices)}")
    if precision == "fp8":
        blackwell = hardware in ("b200", "gb200")
        recipe.trainer.plugins = bf16_with_mxfp8_mixed() if blackwell else bf16_with_fp8_mixed()
        if blackwell:
            recipe.trainer.strategy.ddp.fp8_param_gather = True  # Megatron's condition for the next
            recipe.trainer.strategy.ddp.reuse_grad_buf_for_mxfp8_param_ag = True
            recipe.optim.config.reuse_grad_buf_for_mxfp8_param_ag = True
    else:
        recipe.trainer.plugins = fp32() if precision == "fp32" else bf16_mixed()
