"""What optimizer states may be kept in; checked before a job starts, without Megatron."""

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.precision import MegatronMixedPrecision

# What optimizer states may be kept in: each is saved and read back without losing a bit.
_STATE_DTYPES = {
    "main_grads_dtype": (torch.float32, torch.bfloat16),
    "main_params_dtype": (torch.float32,),
    "exp_avg_dtype": (torch.float32, torch.bfloat16),
    "exp_avg_sq_dtype": (torch.float32, torch.bfloat16),
}


def check_states(optim: MegatronOptimizerModule, precision: MegatronMixedPrecision, *, frozen: bool) -> None:
    """Refuse an optimizer without a learning rate, or with states that could not be saved or computed with.

    Args:
        optim: The recipe's.
        precision: The recipe's, decided (`training/precision.py`) or not.
        frozen: Whether adapters are trained.

    Raises:
        RecipeError: names the setting.
    """
    config = optim.config
    if config.lr is None:
        raise RecipeError("optim.config.lr=None: set a learning rate.")
    if not config.use_precision_aware_optimizer:
        return
    name = "optim.config.use_precision_aware_optimizer=True"
    if precision.precision != "bf16-mixed":
        raise RecipeError(f"{name} needs trainer.plugins.precision='bf16-mixed', not {precision.precision!r}.")
    for field, allowed in _STATE_DTYPES.items():
        value = getattr(config, field)
        if value not in allowed:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise RecipeError(
                f"optim.config.{field}={str(value).removeprefix('torch.')} is not supported; use {known}."
            )
    if config.optimizer_cpu_offload:
        raise RecipeError(
            f"{name} cannot be combined with optim.config.optimizer_cpu_offload=True; set only one of them."
        )
    if precision.fp8 and precision.fp8_recipe == "delayed" and precision.fp8_param_gather and not frozen:
        raise RecipeError(
            f"{name} cannot be combined with training weights stored in FP8 with delayed scaling; set "
            "trainer.plugins.fp8_param_gather=false."
        )
