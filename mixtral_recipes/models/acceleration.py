"""Fused kernels and grouped products, in one table: what each does, and what it needs.

All are off in the configurations, so that a model builds anywhere. Where Transformer Engine runs, `accelerated`
switches them on, unless ``model.config.accelerate=False`` leaves every field as the recipe has it.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfig


@dataclass(frozen=True)
class Knob:
    """One TransformerConfig field.

    Attributes:
        field: Its name.
        value: What it becomes.
        reason: What it saves.
        transformer_engine: Oldest version that has the kernel; None where the kernel is not Transformer Engine's.
    """

    field: str
    value: Any
    reason: str
    transformer_engine: str | None = None


# Versions: the checks in Megatron-Core 0.19's `extensions/transformer_engine.py`, `moe_utils.py` and
# `transformer_config.py`.
KNOBS = (
    Knob("moe_grouped_gemm", True, "one grouped product for a rank's experts instead of one per expert", "1.9.0"),
    Knob("moe_permute_fusion", True, "tokens are sorted by expert and back in one kernel each", "2.1.0"),
    Knob("moe_router_fusion", True, "top-k, softmax and auxiliary-loss scores in one kernel", "2.7.0"),
    Knob("apply_rope_fusion", True, "rotary embedding of q and k in one kernel, also for packed sequences", "1.4.0"),
    # Megatron's own kernel: it warns that Transformer Engine's is not stable yet (model_parallel_config.py).
    Knob("cross_entropy_loss_fusion", True, "softmax and loss over the vocabulary in one pass, jitted by torch"),
    Knob("cross_entropy_fusion_impl", "native", "as above"),
    Knob("bias_dropout_fusion", True, "residual additions jitted by torch"),
    Knob("bias_activation_fusion", True, "SwiGLU and the expert's probability jitted into one kernel"),
    # Of Transformer Engine's layers; the output layer is Megatron's, and needs Apex for it (`models/builder.py`).
    Knob("gradient_accumulation_fusion", True, "the product adds a weight's gradient to the fp32 buffer", "1.4.0"),
)


def refuse_without(config: MixtralConfig) -> None:
    """Refuse what only Transformer Engine's layers do, where they do not run.

    Raises:
        RecipeError: the activations of experts are to be recomputed.
    """
    if "moe_act" in (config.recompute_modules or ()):
        raise RecipeError(
            "recompute_modules=['moe_act'] is done by Transformer Engine's grouped experts, which do not run "
            "here; use ['moe'], which recomputes experts whole, on PyTorch's own layers."
        )


# Losses whose counts are means over sequences or steps: the fused kernel takes whole numbers only.
_FRACTIONAL = frozenset({"seq_aux_loss", "global_aux_loss"})


def accelerated(config: MixtralConfig, *, adapters: bool, quantized: bool = False) -> dict[str, Any]:
    """Fields to set where Transformer Engine runs.

    Args:
        config: The recipe's configuration; ``accelerate=False`` sets nothing.
        adapters: Whether the weights are frozen under adapters: then no weight gradient is accumulated.
        quantized: Whether they are quantised: then experts are multiplied one by one, by our layers.
    """
    if not config.accelerate:
        return {}
    found = _as_numbers(version("transformer_engine"))
    fields = {
        knob.field: knob.value
        for knob in KNOBS
        if knob.transformer_engine is None or found >= _as_numbers(knob.transformer_engine)
    }
    if adapters:
        # The kernel writes into weight.main_grad, which a frozen weight has not.
        fields["gradient_accumulation_fusion"] = False
    if quantized:
        fields["moe_grouped_gemm"] = False
    if config.moe_router_topk == 1:
        fields["moe_router_fusion"] = False  # not known to take one expert without pre-softmax
    if _losses(config) & _FRACTIONAL:
        fields["moe_router_fusion"] = False
    if config.moe_expert_capacity_factor is not None:
        # Megatron: fused permutation has no dropping without padding.
        fields["moe_permute_fusion"] = config.moe_pad_expert_input_to_capacity
    return fields


def _losses(config: MixtralConfig) -> set[str]:
    kinds = config.moe_router_load_balancing_type
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _as_numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
