"""Megatron's gradient reduction, optimizer and learning-rate schedule, built from the recipe's."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.optimizer import clip_grads, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.peft import optimizer_settings
from mixtral_recipes.peft.attach import reduce_expert_adapter_gradients
from mixtral_recipes.peft.names import is_adapters
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.training.precision import optimizer_fields

_PLAIN: list[Any] = []  # Megatron's function for reductions, as it was before a run


def ddp_config(
    given: DistributedDataParallelConfig, optim: MegatronOptimizerModule, fields: dict[str, Any]
) -> DistributedDataParallelConfig:
    """The recipe's DDP settings with those that follow from the run."""
    if optim.config.main_grads_dtype is torch.bfloat16:  # that of the buffers, which the optimizer reads as they are
        fields = fields | {"grad_reduce_in_fp32": False}
    if not optim.config.use_distributed_optimizer:  # every rank updates all weights: there are none to gather
        fields = fields | {"overlap_param_gather": False}
    return dataclasses.replace(
        given,
        **fields,
        use_distributed_optimizer=optim.config.use_distributed_optimizer,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # the loop checks loss and gradient norm itself, and names the step
    )


class Reduced(DistributedDataParallel):
    """Megatron's DDP, whose hooks do not keep it.

    Autograd's nodes hold the hooks, optimizers hold some of the nodes, and the garbage collector does not look into
    them: with hooks that hold DDP, and through it the whole run, no run's memory would ever come back.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        this, weight = weakref.ref(self), weakref.ref(param)

        def hook(*gradients: Any) -> None:
            ddp, of = this(), weight()
            if ddp is not None and of is not None:
                DistributedDataParallel._make_backward_post_hook(ddp, of)(*gradients)

        return hook


def wrap(chunks: list[Any], config: MixtralConfig, settings: DistributedDataParallelConfig) -> list[Any]:
    """Cast outputs back to fp32 where weights are 16-bit, and wrap in Megatron's DDP."""
    _forget_fp32_accumulation()
    low = config.bf16 or config.fp16
    return [
        Reduced(
            config=config,
            ddp_config=settings,
            module=in_16_bits(config, chunk) if low else chunk,
            # Interleaved chunks after the first are reduced when their turn comes, not bucket by bucket.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def _forget_fp32_accumulation() -> None:
    """Undo what Megatron keeps, of ``reduce_scatter_with_fp32_accumulation``, for all later runs of a process."""
    if _PLAIN and buffers.dist_reduce_scatter_func is buffers.reduce_scatter_with_fp32_accumulation:
        buffers.dist_reduce_scatter_func = _PLAIN.pop()
    _PLAIN[:] = [buffers.dist_reduce_scatter_func]


def in_16_bits(config: Any, chunk: Any) -> Float16Module:
    """Megatron's Float16Module, parameters keeping what was said of them, and adapters ``peft.lora_dtype``.

    Torch swaps a tensor subclass, as Transformer Engine's FP8 weights are, for a fresh one when a module is cast: what
    Megatron wrote on it is lost, such as ``allreduce=False`` of an expert's, which is then taken for a dense weight.
    """
    said = [(parameter, dict(vars(parameter))) for parameter in chunk.parameters()]
    adapters = [(parameter, parameter.data) for name, parameter in chunk.named_parameters() if is_adapters(name)]
    wrapped = Float16Module(config, chunk)
    for parameter, values in adapters:
        parameter.data = values
    for parameter, attributes in said:
        for name, value in attributes.items():
            vars(parameter).setdefault(name, value)
    return wrapped


def _finalize_gradients(ddp: list[Any], num_tokens: Tensor | None = None, **named: Any) -> None:
    """Reduce all gradients over the ranks that share a parameter, and divide by the global batch's label tokens."""
    finalize_model_grads(ddp, num_tokens, **named)
    reduce_expert_adapter_gradients(ddp)


def connect(config: Any, ddp: list[Any], optimizer: Any) -> None:
    """Give Megatron's schedules, through its config, the hooks they call."""
    single = len(ddp) == 1
    config.finalize_model_grads_func = _finalize_gradients
    config.grad_scale_func = optimizer.scale_loss
    settings = ddp[0].ddp_config
    if settings.overlap_grad_reduce:
        config.no_sync_func = ddp[0].no_sync if single else [chunk.no_sync for chunk in ddp]
        if settings.align_param_gather:
            config.grad_sync_func = ddp[0].start_grad_sync if single else [c.start_grad_sync for c in ddp]
    if settings.overlap_param_gather and settings.align_param_gather:
        config.param_sync_func = ddp[0].start_param_sync if single else [c.start_param_sync for c in ddp]


def build_optimizer(
    optim: MegatronOptimizerModule, model: list[Any], precision: MegatronMixedPrecision, peft: LoRA | None = None
) -> Any:
    """Megatron's (distributed) optimizer over DDP-wrapped model chunks; ``peft`` may have learning rates of its own."""
    schedule = optim.lr_scheduler
    lr = optim.config.lr
    assert lr is not None  # `check_states`
    min_lr = min(schedule.min_lr, lr) if schedule else lr
    config = dataclasses.replace(optim.config, min_lr=min_lr, **optimizer_fields(precision, frozen=peft is not None))
    with cpu_device.cuda_type_names():
        own = get_standard_config_overrides(config) | optimizer_settings.overrides(peft, config)
        optimizer = get_megatron_optimizer(config, model, config_overrides=own)
    prepare_adam(optimizer)
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
    return optimizer


def norm_of_all(_size: int, _overflow: Tensor, lists: list[list[Tensor]], _each: bool) -> tuple[Tensor, None]:
    """The norm of a list's tensors, [1], fp32, on their device.

    For where no kernel of Transformer Engine or Apex measures it. What Megatron has for that place reads the norm of
    every tensor on the host.
    """
    norms = torch._foreach_norm(lists[0], dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def prepare_adam(optimizer: Any) -> None:
    """Make torch's Adam, if it is that, update each parameter in one pass, and give it its whole state at once.

    Megatron prepares the two moments before a checkpoint is read but not ``step``, which Transformer Engine's
    FusedAdam keeps elsewhere; torch's takes a state without it to be complete and fails.
    """
    for part in parts_of(optimizer):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam):
            continue
        for group in adam.param_groups:
            group["fused"] = True
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def build_scheduler(optim: MegatronOptimizerModule, optimizer: Any, max_steps: int) -> OptimizerParamScheduler:
    """Megatron's schedule, stepped once per optimizer step.

    Raises:
        RecipeError: its parts do not fit the run's steps.
    """
    lr, schedule = optim.config.lr or 0.0, optim.lr_scheduler
    constant = {"lr_warmup_steps": 0, "lr_decay_steps": max_steps, "lr_decay_style": "constant"}
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min(schedule.min_lr, lr) if schedule else lr,
        start_wd=optim.config.weight_decay,
        end_wd=optim.config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        **(schedule.megatron(schedule.max_steps or max_steps) if schedule else constant),
    )
