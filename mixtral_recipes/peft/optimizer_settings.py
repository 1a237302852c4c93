"""What the optimizer does with adapters' parameters otherwise than with all others."""

from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey

from mixtral_recipes.settings.peft import LoRA


def overrides(scheme: LoRA | None, config: OptimizerConfig) -> dict[ParamKey, Any]:
    """Megatron's settings of single parameters.

    Lengths do not decay: Megatron lets no vector, and a gated layer has two of them in one parameter. Under LoRA+ B
    learns faster than A (Hayou et al., arXiv 2402.12354: by 16 for Llama, where A and B are of one size).

    Args:
        scheme: What is trained; None is all weights.
        config: Megatron's optimizer settings, learning rates filled in.
    """
    found: dict[ParamKey, Any] = {ParamKey(name="*.magnitude"): {"wd_mult": 0.0}}
    if scheme is not None and scheme.loraplus_lr_ratio is not None:
        assert config.lr is not None
        ratio = scheme.loraplus_lr_ratio
        found[ParamKey(name="*.lora_b")] = {"max_lr": config.lr * ratio, "min_lr": (config.min_lr or 0.0) * ratio}
    return found
