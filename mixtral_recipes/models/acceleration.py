"""Fused kernels and grouped products, in one table: what each does, and what it needs.

All are off in the configurations, so that a model builds anywhere. On a GPU, `accelerated` switches on those that the
recipe does not give, as far as they need no Transformer Engine or it runs; ``model.config.accelerate=False`` leaves
every field as the recipe has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.system.machine import no_compiler

APEX = "fused_weight_gradient_mlp_cuda"  # the extension of it that adds weight gradients to their buffer


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
    Knob("cross_entropy_loss_fusion", True, "softmax and loss over the vocabulary, jitted by torch"),
    # Megatron-Core 0.19 warns of older ones, which rounded gradients twice (model_parallel_config.py; TransformerEngine
    # pull request 3193), and kept them from the forward pass on (3273).
    Knob("cross_entropy_fusion_impl", "te", "one pass over 16-bit logits each way, where torch makes ten", "2.20.0"),
    Knob("bias_dropout_fusion", True, "residual additions jitted by torch"),
    Knob("bias_activation_fusion", True, "SwiGLU and the expert's probability jitted into one kernel"),
    # Of Transformer Engine's layers; the output layer is Megatron's, and needs Apex for it (`models/builder.py`).
    Knob("gradient_accumulation_fusion", True, "the product adds a weight's gradient to the fp32 buffer", "1.4.0"),
)


_LEAVE_OUT = "leave it out: it is switched on automatically where it is supported"


@dataclass(frozen=True)
class OnlyThere:
    """What only Transformer Engine carries out, and Megatron does not refuse by itself, or not in words.

    Attributes:
        setting: How it is spelled.
        wanted: Whether a configuration asks for it.
        instead: What to do where it does not run.
        why: What does it.
        grouped: Whether its grouped experts do it, which do not run over a quantised base either.
    """

    setting: str
    wanted: Callable[[MixtralConfig], bool]
    instead: str = _LEAVE_OUT
    why: str = "Transformer Engine's kernels"
    grouped: bool = False


_LAYERS = "Transformer Engine's layers"
_ONLY_THERE = (
    OnlyThere(
        "recompute_modules=['moe_act']",
        lambda c: "moe_act" in (c.recompute_modules or ()),
        "use ['moe'], which recomputes whole experts and runs on PyTorch's own layers",
        "Transformer Engine's grouped experts",
        grouped=True,
    ),
    OnlyThere(
        "recompute_modules=['layernorm']",
        lambda c: c.recompute_granularity == "selective" and "layernorm" in (c.recompute_modules or ()),
        "use ['moe'], which saves even more memory",
        _LAYERS,
    ),
    OnlyThere("moe_router_fusion=True", lambda c: c.moe_router_fusion),
    OnlyThere("moe_permute_fusion=True", lambda c: c.moe_permute_fusion),
    OnlyThere("apply_rope_fusion=True", lambda c: c.apply_rope_fusion),
    OnlyThere("fused_single_qkv_rope=True", lambda c: c.fused_single_qkv_rope, "leave it out"),
    OnlyThere(
        "cross_entropy_fusion_impl='te'",
        lambda c: c.cross_entropy_loss_fusion and c.cross_entropy_fusion_impl == "te",
        "use 'native'",
    ),
    OnlyThere(
        "gradient_accumulation_fusion=True",
        lambda c: c.gradient_accumulation_fusion and find_spec(APEX) is None,
        why="the kernels of Transformer Engine or Apex",
    ),
    OnlyThere("cpu_offloading=True", lambda c: c.cpu_offloading, "recompute layers instead", _LAYERS),
    OnlyThere(
        "fine_grained_activation_offloading=True",
        lambda c: c.fine_grained_activation_offloading,
        "recompute layers instead",
        _LAYERS,
    ),
    OnlyThere("tp_comm_overlap=True", lambda c: c.tp_comm_overlap, "leave it out", _LAYERS),
    OnlyThere("attention_dropout", lambda c: c.attention_dropout > 0, "set it to 0", _LAYERS),
)


def refuse_without(config: MixtralConfig, *, grouped_only: bool = False) -> None:
    """Refuse what only Transformer Engine's layers do, where they do not run.

    Args:
        config: The model's configuration.
        grouped_only: Whether it is only its grouped experts that do not run, the rest does.

    Raises:
        RecipeError: names the setting, and what to do instead.
    """
    for row in _ONLY_THERE:
        if row.wanted(config) and (row.grouped or not grouped_only):
            raise RecipeError(
                f"model.config.{row.setting} needs {row.why}, which this run does not use; {row.instead}."
            )


# Losses whose counts are means over sequences or steps: the fused kernel takes whole numbers only.
_FRACTIONAL = frozenset({"seq_aux_loss", "global_aux_loss"})


def accelerated(
    config: MixtralConfig,
    *,
    adapters: bool,
    quantized: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    transformer_engine: bool = True,
) -> dict[str, Any]:
    """Fields to set on a GPU.

    Args:
        config: The recipe's configuration; ``accelerate=False`` sets nothing, and a field that is given is set only
            off where it cannot be carried out, or not exactly.
        adapters: Whether the weights are frozen under adapters: then no weight gradient is accumulated.
        quantized: Whether they are quantised: then experts are multiplied one by one, by our layers.
        dtype: Of the weights, as the precision has it.
        transformer_engine: Whether it runs.
    """
    if not config.accelerate:
        return {}
    found = _as_numbers(version("transformer_engine")) if transformer_engine else ()
    fields = {
        knob.field: knob.value
        for knob in KNOBS
        if not config.is_given(knob.field)
        and (knob.transformer_engine is None or found >= _as_numbers(knob.transformer_engine))
    }
    return fields | dict.fromkeys(_cannot_be(config, adapters=adapters, quantized=quantized, dtype=dtype), False)


def _cannot_be(config: MixtralConfig, *, adapters: bool, quantized: bool, dtype: torch.dtype) -> set[str]:
    """What is off whatever the recipe gives."""
    off = set[str]()
    if adapters:
        # Written into weight.main_grad, which a frozen weight has not; nor has the output layer a gradient to defer.
        off |= {"gradient_accumulation_fusion", "defer_embedding_wgrad_compute"}
    if quantized:
        off.add("moe_grouped_gemm")
    if config.moe_router_topk == 1:
        off.add("moe_router_fusion")  # not known to take one expert without pre-softmax
    if _losses(config) & _FRACTIONAL or not _fused_router_takes(config):
        off.add("moe_router_fusion")
    if dtype is not torch.bfloat16:
        off.add("cross_entropy_loss_fusion")  # it rounds the logits' gradient to bf16, whatever they are
    if config.deterministic_mode:
        # Compiled anew for other shapes, they add up the vocabulary, or an expert's width for the gradient of its
        # probability, in another order. Megatron-LM refuses the first.
        off |= {"cross_entropy_loss_fusion", "bias_activation_fusion"}
    if no_compiler():
        off |= {"moe_permute_fusion", "cross_entropy_loss_fusion"}  # Triton's; what torch compiles runs uncompiled
    if config.moe_expert_capacity_factor is not None and not config.moe_pad_expert_input_to_capacity:
        off.add("moe_permute_fusion")  # Megatron: fused permutation has no dropping without padding
    return off


def _fused_router_takes(config: MixtralConfig) -> bool:
    """Transformer Engine asserts that logits are not fp64, and its kernel would not look at a replay."""
    return not (config.moe_router_dtype == "fp64" or config.moe_enable_routing_replay)


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
