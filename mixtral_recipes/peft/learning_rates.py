"""LoRA+: B learns faster than A (Hayou et al., arXiv 2402.12354: by 16 for Llama, where A and B are of one size)."""

from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey

from mixtral_recipes.settings.peft import LoRA


def overrides(scheme: LoRA | None, config: OptimizerConfig) -> dict[ParamKey, Any]:
    """Megatron's settings of the parameters that do not learn at ``optim.config.lr``.

    Args:
        scheme: What is trained; None is all weights.
        config: Megatron's optimizer settings, learning rates filled in.
    """
    ratio = scheme.loraplus_lr_ratio if scheme is not None else None
    if ratio is None:
        return {}
    assert config.lr is not None
    return {ParamKey(name="*.lora_b"): {"max_lr": config.lr * ratio, "min_lr": (config.min_lr or 0.0) * ratio}}
