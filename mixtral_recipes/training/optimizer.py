"""Megatron's optimizer and learning-rate schedule, built from the recipe's."""

import dataclasses
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.training.precision import optimizer_fields


def build_optimizer(optim: MegatronOptimizerModule, model: list[Any], precision: MegatronMixedPrecision) -> Any:
    """Megatron's (distributed) optimizer over DDP-wrapped model chunks.

    Raises:
        RecipeError: no learning rate is set.
    """
    schedule = optim.lr_scheduler
    lr = optim.config.lr
    if lr is None:
        raise RecipeError("optim.config.lr=None: set a learning rate.")
    min_lr = min(schedule.min_lr, lr) if schedule else lr
    config = dataclasses.replace(optim.config, min_lr=min_lr, **optimizer_fields(precision))
    with cpu_device.cuda_type_names():
        optimizer = get_megatron_optimizer(config, model)
    if cpu_device.active():
        _prepare_adam(optimizer)
    return optimizer


def _prepare_adam(optimizer: Any) -> None:
    """Make torch's AdamW update each parameter in one pass, and give it its whole state at once.

    Megatron prepares the two moments before a checkpoint is read but not ``step``, which Transformer Engine's
    FusedAdam keeps elsewhere; torch's AdamW takes a state without it for a finished one and fails.
    """
    for part in parts_of(optimizer):
        adam = part.optimizer
        for group in adam.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def build_scheduler(optim: MegatronOptimizerModule, optimizer: Any, max_steps: int) -> OptimizerParamScheduler:
    """Megatron's schedule, stepped once per optimizer step.

    Raises:
        RecipeError: no step is left to decay over.
    """
    lr = optim.config.lr or 0.0
    schedule = optim.lr_scheduler or CosineAnnealingScheduler(warmup_steps=0, min_lr=lr)
    decay_steps = (schedule.max_steps or max_steps) - schedule.constant_steps
    warmup = schedule.warmup_steps
    if warmup >= decay_steps:
        # A short run of a long recipe (max_steps=20 with warmup 50) keeps the recipe's proportions visible:
        # warm up over the first tenth instead of never reaching the learning rate.
        warmup = decay_steps // 10
    if decay_steps < 1:
        raise RecipeError(
            f"optim.lr_scheduler.constant_steps={schedule.constant_steps} leaves no step of "
            f"trainer.max_steps={max_steps}."
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min(schedule.min_lr, lr),
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_steps,
        lr_decay_style="cosine" if optim.lr_scheduler else "constant",
        start_wd=optim.config.weight_decay,
        end_wd=optim.config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
