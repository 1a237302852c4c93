"""Settings that have no effect, or only one value: NeMo's recipes and scripts hold them, so they are known here.

The one place for them. What is not in this table is read somewhere; a test walks every field of every settings class.
Rules go by class name and hold for subclasses too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.errors import nearest
from mixtral_recipes.settings.conformity import default


@dataclass(frozen=True)
class Ignored:
    """A setting that nothing reads: a value other than the default and that of NeMo's recipes gives a notice.

    Attributes:
        why: What happens instead.
        nemo: Task -> the value NeMo's recipes of it hold.
        quiet: Further values that give no notice.
        beside: Another setting of the same part, whose value this one may repeat.
    """

    why: str
    nemo: dict[str, Any] = field(default_factory=dict)
    quiet: tuple[Any, ...] = ()
    beside: str | None = None


@dataclass(frozen=True)
class Only:
    """A setting with only one possible value; any other is refused."""

    value: Any
    why: str


@dataclass(frozen=True)
class Keys:
    """A mapping of which only some keys are read: any other key gives a notice."""

    known: tuple[str, ...]


Rule = Ignored | Only | Keys

_MODELS_TOKENIZER = Ignored("the model's tokenizer is used; set model.tokenizer")
_HUB_ARGUMENTS = Ignored("nothing here takes arguments for NeMo's dataset class")
_PACKS_ARE_MADE = Ignored("packs are made from the samples, and cached")
_BY_STRATEGY = Ignored("the layout is stated in trainer.strategy", quiet=(1,))
_BY_PLUGINS = Ignored("number formats are stated in trainer.plugins")

# What makes a model compute something that no Mixtral does: a checkpoint's weights would be another model, and
# config.json could not say what was trained. Megatron's TransformerConfig field -> Mixtral's value.
_MIXTRALS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "activation_func_clamp_value", "experimental_attention_variant", "linear_attention_freq", "moe_latent_size",
            "moe_router_group_topk", "moe_router_num_groups", "moe_router_topk_limited_devices",
            "moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size", "mrope_section",
            "mtp_num_layers", "no_rope_freq", "softmax_scale", "window_attn_skip_freq", "window_size",
        ),
        None,
    ),
    **dict.fromkeys(
        (
            "add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm", "attention_output_gate",
            "heterogeneous_block_specs", "is_hybrid_model", "layernorm_zero_centered_gamma",
            "moe_apply_probs_on_input", "moe_router_enable_expert_bias", "moe_router_force_load_balancing",
            "moe_router_pre_softmax", "moe_shared_expert_gate", "multi_latent_attention", "qk_l2_norm",
            "qk_layernorm", "rotary_interleaved", "share_embeddings_and_output_weights", "use_mup",
        ),
        False,
    ),
    "activation_func": "silu",  # by its name
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
}  # fmt: skip

EFFECTS: dict[str, dict[str, Rule]] = {
    "Trainer": {
        "accumulate_grad_batches": Only(1, "accumulation follows from data.global_batch_size"),
        "limit_test_batches": Ignored("there is no test loop", nemo={"pretrain": 50}),
        "use_distributed_sampler": Ignored("every data-parallel rank reads its own share of the data"),
    },
    "MegatronStrategy": {
        "gradient_as_bucket_view": Ignored("Megatron's DDP always keeps gradients in its buckets"),
        "ckpt_parallel_load": Ignored("every rank reads its own part of a checkpoint", nemo={"pretrain": True}),
        "ckpt_load_strictness": Ignored(
            "a checkpoint that lacks a tensor of the model is refused", nemo={"finetune": "log_all"}
        ),
    },
    "DistributedDataParallelConfig": {
        "average_in_collective": Ignored("gradients are summed and divided by the global batch's label tokens"),
    },
    "OptimizerConfig": {
        "min_lr": Ignored("the schedule's is used; set optim.lr_scheduler.min_lr"),
        "bf16": Ignored(_BY_PLUGINS.why, nemo={"pretrain": True, "finetune": True}),
        **dict.fromkeys(("fp16", "params_dtype"), _BY_PLUGINS),
    },
    "RestoreConfig": {
        "load_model_state": Only(True, "a run that restores nothing has resume.restore_config=null"),
    },
    "MixtralConfig": {
        **{name: Only(value, "it would be another model than Mixtral") for name, value in _MIXTRALS.items()},
        "seq_length": Ignored("sequences are as long as data.seq_length says", beside="max_position_embeddings"),
        **dict.fromkeys(
            (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "virtual_pipeline_model_parallel_size",
                "context_parallel_size",
                "expert_model_parallel_size",
                "expert_tensor_parallel_size",
            ),
            _BY_STRATEGY,
        ),
        "sequence_parallel": Ignored(_BY_STRATEGY.why),
        **dict.fromkeys(("bf16", "fp16", "params_dtype"), _BY_PLUGINS),
    },
    "PackedSequenceSpecs": {
        "tokenizer_model_name": Ignored("samples are cached under the tokenizer's content"),
        "packed_train_data_path": _PACKS_ARE_MADE,
        "packed_val_data_path": _PACKS_ARE_MADE,
        "packed_metadata_path": _PACKS_ARE_MADE,
    },
    "SquadDataModule": {
        "tokenizer": _MODELS_TOKENIZER,
        "dataset_kwargs": _HUB_ARGUMENTS,
        "delete_raw": Ignored("the Hub's cache is kept"),
    },
    "FineTuningDataModule": {
        "tokenizer": _MODELS_TOKENIZER,
        "dataset_kwargs": Keys(("prompt_template", "label_key", "answer_only_loss", "add_bos", "add_eos")),
    },
    "ChatDataModule": {"tokenizer": _MODELS_TOKENIZER, "dataset_kwargs": _HUB_ARGUMENTS},
    "PreTrainingDataModule": {
        "tokenizer": _MODELS_TOKENIZER,
        "create_attention_mask": Ignored("the causal mask is made inside the attention"),
    },
    "TimingCallback": {
        "log_tokens_per_sec": Ignored("tokens per second are always reported"),
        "timer_kwargs": Ignored("steps are timed by the wall clock"),
    },
}


def rules_of(target: Any) -> dict[str, Rule]:
    """The rules of a class, its bases' included."""
    found: dict[str, Rule] = {}
    for cls in reversed(getattr(target, "__mro__", ())):
        found |= EFFECTS.get(cls.__name__, {})
    return found


def refusal(rule: Rule, path: str, value: Any) -> str | None:
    """Why a value is refused; None where it is not."""
    if isinstance(rule, Only) and getattr(value, "__name__", value) != rule.value:
        return f"{path}={value!r}: must be {rule.value!r}: {rule.why}."
    return None


def notice(rule: Rule, target: Any, path: str, given: Mapping[Any, Any], task: str) -> str | None:
    """The notice for a value that is not read; None if there is nothing to say.

    Args:
        rule: The setting's rule.
        target: The class it belongs to.
        path: Its dotted path, whose last part is its name.
        given: The values of the class's settings.
        task: ``pretrain`` or ``finetune``.
    """
    name = path.rpartition(".")[2]
    value = given[name]
    if isinstance(rule, Keys):
        unknown = sorted(set(value or {}) - set(rule.known))
        return f"{path}: {', '.join(unknown)} has no effect.{nearest(unknown[0], rule.known)}" if unknown else None
    if not isinstance(rule, Ignored):
        return None
    silent = [default(target, name), *rule.quiet]
    silent += [rule.nemo[task]] if task in rule.nemo else []
    if rule.beside is not None:
        silent.append(given.get(rule.beside, dataclasses.MISSING))
    return None if value in silent else f"{path}={value!r} has no effect: {rule.why}."
