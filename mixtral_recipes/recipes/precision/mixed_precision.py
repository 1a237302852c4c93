"""Number formats, with NeMo 2.0's values."""

import nemo_run as run

from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.settings.precision import MegatronMixedPrecision

Precision = run.Config[MegatronMixedPrecision]


@run.cli.factory
@returns_config
def bf16_mixed() -> run.Config[MegatronMixedPrecision]:
    """bf16 weights and activations, fp32 master weights."""
    return run.Config(MegatronMixedPrecision, precision="bf16-mixed")


@run.cli.factory
@returns_config
def fp16_mixed() -> run.Config[MegatronMixedPrecision]:
    """fp16 weights and activations with a dynamic loss scale, fp32 master weights."""
    return run.Config(MegatronMixedPrecision, precision="16-mixed", grad_reduce_in_fp32=False)


@returns_config
def fp32() -> Precision:
    """Everything in fp32."""
    return run.Config(MegatronMixedPrecision, precision="32")


@returns_config
def bf16_with_fp8_mixed() -> Precision:
    """bf16 with matrix products in FP8, delayed scaling: Hopper's choice."""
    return _fp8(
        "delayed", fp8_margin=0, fp8_amax_history_len=1024, fp8_amax_compute_algo="max"
    )  # a maximum over the last 1024 steps


@returns_config
def bf16_with_fp8_current_scaling_mixed() -> Precision:
    """bf16 with matrix products in FP8, scaled by each tensor as it is; the first and last layer stay in bf16."""
    return _fp8("tensorwise", first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)


@returns_config
def bf16_with_fp8_subchannel_scaling_mixed() -> Precision:
    """bf16 with matrix products in FP8, scaled by blocks."""
    return _fp8("blockwise")


@returns_config
def bf16_with_mxfp8_mixed() -> Precision:
    """bf16 with matrix products in MXFP8: Blackwell's choice.

    A recipe then also sets ``reuse_grad_buf_for_mxfp8_param_ag`` in ``trainer.strategy.ddp`` and ``optim.config``.
    """
    return _fp8("mxfp8", fp8_param_gather=True)  # those are gathered through the gradients' memory


def _fp8(recipe: str, **settings: object) -> Precision:
    config = bf16_mixed()
    # NeMo: True everywhere. What does not gain by it keeps bf16 weights here.
    config.fp8, config.fp8_recipe, config.fp8_param_gather = "hybrid", recipe, None
    for name, value in settings.items():
        setattr(config, name, value)
    return config
