"""Number formats of a run: what the recipe's words mean for Megatron's model, optimizer and gradient reduction."""

import dataclasses
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.kernels import INSTALL, transformer_engine_usable
from mixtral_recipes.settings.precision import MegatronMixedPrecision

_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Compute capability each scaling recipe's kernels need. Source: Transformer Engine 2.x `pytorch/quantization.py`
# (check_fp8_support, check_fp8_block_scaling_support, check_mxfp8_support).
_CAPABILITY = {"delayed": (9, 0), "tensorwise": (9, 0), "blockwise": (9, 0), "mxfp8": (10, 0)}
_GENERATION = {(9, 0): "Hopper (H100, H200) or later", (10, 0): "Blackwell (B200, GB200)"}


def decided(precision: MegatronMixedPrecision, topology: Topology, *, frozen: bool) -> MegatronMixedPrecision:
    """The same with what it leaves open decided for a run: `MegatronMixedPrecision.keeps_fp8_weights`."""
    return dataclasses.replace(precision, fp8_param_gather=precision.keeps_fp8_weights(topology, frozen=frozen))


def in_words(precision: MegatronMixedPrecision) -> str | None:
    """How a run computes in FP8, in a line; None where it does not."""
    if not precision.fp8:
        return None
    return (
        f"FP8: {precision.fp8_recipe} scaling, {precision.fp8}; linear layers keep their weights in "
        f"{'FP8' if precision.fp8_param_gather else 'bf16, cast to FP8 for matrix products'} "
        "(trainer.plugins.fp8_param_gather)"
    )


def model_fields(precision: MegatronMixedPrecision) -> dict[str, Any]:
    """TransformerConfig fields a precision sets."""
    fields = _dtype_fields(precision)
    dtype = fields["params_dtype"]
    fields |= {"pipeline_dtype": dtype, "autocast_dtype": dtype, "enable_autocast": False}
    if precision.fp8:
        same_name = (
            "fp8", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
            "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
        )  # fmt: skip
        fields |= {name: getattr(precision, name) for name in same_name}
        fields["fp8_param"] = bool(precision.fp8_param_gather)
    return fields


def optimizer_fields(precision: MegatronMixedPrecision, *, frozen: bool = False) -> dict[str, Any]:
    """OptimizerConfig fields a precision sets; ``frozen`` where adapters are trained, which are in bf16."""
    fields = _dtype_fields(precision)
    if fields["fp16"]:
        same_name = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
        fields |= {name: getattr(precision, name) for name in same_name}
    if precision.fp8:
        fields |= {"fp8_recipe": precision.fp8_recipe, **_mxfp8_buffers(precision, frozen)}
    return fields


def _dtype_fields(precision: MegatronMixedPrecision) -> dict[str, Any]:
    """What both configs say of weights and activations outside FP8 products; refuses unknown words."""
    precision.check()
    dtype = _DTYPES[precision.precision]
    return {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16, "params_dtype": dtype}


def ddp_fields(precision: MegatronMixedPrecision, *, frozen: bool = False) -> dict[str, Any]:
    """DistributedDataParallelConfig fields a precision sets; ``frozen`` as for `optimizer_fields`."""
    gathers = _gathers_fp8(precision, frozen)
    fields: dict[str, Any] = {"fp8_param_gather": gathers, **_mxfp8_buffers(precision, frozen)}
    if precision.grad_reduce_in_fp32 is not None:
        fields["grad_reduce_in_fp32"] = precision.grad_reduce_in_fp32
    return fields


def _gathers_fp8(precision: MegatronMixedPrecision, frozen: bool) -> bool:
    return bool(precision.fp8 and precision.fp8_param_gather and not frozen)


def _mxfp8_buffers(precision: MegatronMixedPrecision, frozen: bool) -> dict[str, bool]:
    # MXFP8 weights are two copies, by row and by column; Megatron gathers them through the gradient buffer.
    return {"reuse_grad_buf_for_mxfp8_param_ag": _gathers_fp8(precision, frozen) and precision.fp8_recipe == "mxfp8"}


def check_device(precision: MegatronMixedPrecision) -> None:
    """Refuse a format this machine's GPU does not have.

    Raises:
        RecipeError: names the GPU generation that is needed, or says that Transformer Engine is.
        EnvironmentProblem: Transformer Engine is installed, and does not load.
    """
    precision.check()
    if not precision.fp8:
        return
    needed = _CAPABILITY[precision.fp8_recipe]
    present = torch.cuda.is_available()
    if present and torch.cuda.get_device_capability() >= needed:
        if not transformer_engine_usable():
            raise RecipeError(
                f"trainer.plugins.fp8={precision.fp8!r} needs Transformer Engine, which is not installed: {INSTALL}"
            )
        return
    found = f"this machine has {torch.cuda.get_device_name()}" if present else "there is no GPU"
    raise RecipeError(
        f"trainer.plugins.fp8={precision.fp8!r} with fp8_recipe={precision.fp8_recipe!r} needs {_GENERATION[needed]}; "
        f"{found}; set trainer.plugins.fp8=null or use such a GPU."
    )
