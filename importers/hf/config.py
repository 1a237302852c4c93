"""Between a Hugging Face Mixtral's config.json and Megatron's configuration fields. Pure functions, no torch.

A field that changes what the model computes and that the model here cannot honour is refused, never dropped.
"""

from typing import Annotated, Any, TypedDict

from msgspec import Meta

from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.importers.hf import rope
from mixtral_recipes.layout.shapes import LARGEST, ModelShape
from mixtral_recipes.settings.nemo.mixtrals import BALANCING, MIXTRALS, balances_as_mixtral
from mixtral_recipes.system.schema import Count, typed

# What transformers assumes where config.json is silent. Source: transformers MixtralConfig.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "rope_theta": 1e6,
}

# Megatron field -> config.json field, for those that are the same number under another name.
SAME_NUMBER = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "moe_ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "num_moe_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "attention_dropout": "attention_dropout",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}

# Fields of `to_megatron` that change no number the model computes from its weights; not every form states them.
WITHOUT_EFFECT = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "max_position_embeddings",
    "moe_aux_loss_coeff",
)

# Other spellings of a Mixtral's values (`MIXTRALS`).
_ALSO: dict[str, tuple[Any, ...]] = {
    "moe_router_topk_scaling_factor": (1.0,),
    "moe_shared_expert_intermediate_size": (0,),
    "mtp_num_layers": (0,),
    "seq_len_interpolation_factor": (1.0,),
}

# Whole numbers from 1, and the most each may be.
_POSITIVE = {SAME_NUMBER[name]: most for name, most in LARGEST.items()}
_POSITIVE["num_experts_per_tok"] = LARGEST["num_moe_experts"]

# Numbers of any kind, and the most each may be. The norms divide by what rms_norm_eps keeps from zero.
_NUMBERS = {
    "rms_norm_eps": 1.0,
    "initializer_range": 1e3,
    "router_aux_loss_coef": 1e6,
    "attention_dropout": 1.0,
}


type _Ids = Count | list[Count] | None


class _Fields(TypedDict, total=False):
    """What is neither a size nor a number above, where it is stated."""

    model_type: str | None
    architectures: list[str] | None
    quantization_config: dict[str, Any] | None
    transformers_weights: str | None
    hidden_act: str
    tie_word_embeddings: bool | None
    sliding_window: Count | None
    router_jitter_noise: Annotated[float, Meta(ge=0, le=1)] | None
    torch_dtype: str | None
    bos_token_id: _Ids
    eos_token_id: _Ids
    pad_token_id: _Ids


def value(config: dict[str, Any], field: str) -> Any:
    """A field of config.json, or what transformers would assume for it."""
    if field == "num_local_experts" and field not in config and "num_experts" in config:
        return config["num_experts"]  # transformers 5 reads either spelling
    found = config.get(field, DEFAULTS[field])
    if found is None and field == "head_dim":
        return value(config, "hidden_size") // value(config, "num_attention_heads")
    if found is None and field == "num_key_value_heads":
        return value(config, "num_attention_heads")
    return found


def rope_theta(config: dict[str, Any]) -> float:
    """The rotary base.

    Raises:
        CheckpointError: it is not a positive number, or a scaling that has an effect is asked for.
    """
    theta = rope.base(config, DEFAULTS["rope_theta"])
    names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    rope.check(config, theta, {name: value(config, name) for name in names})
    return theta


def without_window_and_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without a sliding window or scaling, which `check` lets pass where they change nothing.

    They change nothing up to a length; here nothing at any length. A model that is trained longer must not keep them.
    """
    plain = rope.without_scaling(config, rope_theta(config))
    return plain | {"sliding_window": None} if plain.get("sliding_window") is not None else plain


def check(config: dict[str, Any]) -> None:
    """Refuse a config.json that describes a model other than the one built here.

    Raises:
        CheckpointError: names the field, its value and the rule.
    """
    typed(config, _Fields, "config.json", CheckpointError)
    _check_architecture(config)
    for field, most in _POSITIVE.items():
        number = value(config, field)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise CheckpointError(f"config.json: {field}={number!r} must be a positive whole number.")
        if number > most:
            raise CheckpointError(f"config.json: {field}={number!r} must be at most {most}.")
    for field, most in _NUMBERS.items():
        number = value(config, field)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= most:
            raise CheckpointError(f"config.json: {field}={number!r} must be a number from 0 to {most:g}.")
    if not value(config, "rms_norm_eps"):
        raise CheckpointError("config.json: rms_norm_eps=0 must be more than 0: a norm would divide by zero.")
    _check_refused(config)
    if value(config, "head_dim") % 2:
        raise CheckpointError(
            f"config.json: head_dim={value(config, 'head_dim')} must be even: it is rotated in pairs."
        )
    heads, groups = value(config, "num_attention_heads"), value(config, "num_key_value_heads")
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_key_value_heads={groups} does not divide num_attention_heads={heads}, as it must."
        )
    if value(config, "num_experts_per_tok") > value(config, "num_local_experts"):
        raise CheckpointError(
            f"config.json: num_experts_per_tok={value(config, 'num_experts_per_tok')} exceeds "
            f"num_local_experts={value(config, 'num_local_experts')}."
        )
    rope_theta(config)


def _check_architecture(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "mixtral":
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, not 'mixtral'; only Mixtral checkpoints can be converted."
        )
    architectures = config.get("architectures") or ["MixtralForCausalLM"]
    if architectures != ["MixtralForCausalLM"]:
        raise CheckpointError(
            f"config.json: architectures is {architectures}; only ['MixtralForCausalLM'] is supported."
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"config.json: the weights are quantized ({method}); convert the original, unquantized checkpoint."
        )
    if (named := config.get("transformers_weights")) is not None:  # transformers 5 loads that file, and no other
        raise CheckpointError(
            f"config.json: transformers_weights={named!r}: mixtral-recipes reads weights only under their usual names; "
            "rename them to model.safetensors, or to model.safetensors.index.json and the files it lists, and remove "
            "this field."
        )


def _check_refused(config: dict[str, Any]) -> None:
    rules = (
        (
            "sliding_window",
            lambda v: v is None or (type(v) is int and v >= value(config, "max_position_embeddings")),
            "sliding-window attention is not supported; it must be null, or at least max_position_embeddings. "
            "Released Mixtral models have null: in an older copy of one, set it to null in config.json",
        ),
        ("tie_word_embeddings", lambda v: not v, "Mixtral does not tie input and output embeddings; it must be false"),
        ("hidden_act", lambda v: v in ("silu", "swish"), "Mixtral's experts use silu; it must be 'silu'"),
        ("router_jitter_noise", lambda v: not v, "router jitter is not supported; it must be 0"),
    )
    for field, accepted, rule in rules:
        if not accepted(value(config, field)):
            raise CheckpointError(f"config.json: {field}={value(config, field)!r}: {rule}.")


def dims(config: dict[str, Any]) -> ModelShape:
    """The sizes that fix every tensor's shape; config.json is checked first."""
    check(config)
    return ModelShape(**{name: value(config, SAME_NUMBER[name]) for name in LARGEST})


def to_megatron(config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for MixtralConfig that describe the same model.

    Args:
        config: config.json of a Hugging Face Mixtral.

    Returns:
        Megatron TransformerConfig field values, and vocab_size, max_position_embeddings and rotary_base. The sequence
        length is a matter of training, not of the weights, and is not among them.

    Raises:
        CheckpointError: a field asks for something the model cannot honour.
    """
    check(config)
    fields = {megatron: value(config, hf) for megatron, hf in SAME_NUMBER.items()}
    return fields | {
        "rotary_base": rope_theta(config),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False,
        "moe_router_pre_softmax": False,
    }


def of_a_mixtral(fields: dict[str, Any], where: str, *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json for a model whose settings come from another program.

    Args:
        fields: Megatron field values; one that is missing has Mixtral's.
        where: What stands before a field's name in an error: the file, and the way to its fields.
        vocab_size: Tokens of the vocabulary, without padding.
        dtype: What the weights are saved in, as torch spells it without ``torch.``.

    Raises:
        CheckpointError: a field asks for something that a Mixtral does not do, or one is missing.
    """
    for name, value in (MIXTRALS | {"seq_len_interpolation_factor": None}).items():
        if fields.get(name, value) not in (value, *_ALSO.get(name, ())):
            raise CheckpointError(f"{where}{name}={fields[name]!r} is not what a Mixtral has; it must be {value!r}.")
    balancing = fields.get("moe_router_load_balancing_type", BALANCING[0])
    if not balances_as_mixtral(balancing):
        raise CheckpointError(
            f"{where}moe_router_load_balancing_type={balancing!r} is not supported; it must be one of "
            f"{', '.join(BALANCING)}."
        )
    try:
        return from_megatron(fields | {"vocab_size": vocab_size}, dtype=dtype)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where.rstrip('.')} is incomplete ({in_short(error)}).") from error


def from_megatron(fields: dict[str, Any], *, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json for a model described in Megatron's fields: the inverse of `to_megatron`.

    Args:
        fields: Megatron field values (``vars`` of a MixtralConfig will do).
        dtype: What the weights are saved in, as torch spells it without ``torch.``.

    Returns:
        A config.json that every transformers release since 4.36 reads.
    """
    heads = fields["num_attention_heads"]
    fields = fields | {
        "moe_ffn_hidden_size": fields.get("moe_ffn_hidden_size") or fields["ffn_hidden_size"],
        "num_query_groups": fields.get("num_query_groups") or heads,
        "kv_channels": fields.get("kv_channels") or fields["hidden_size"] // heads,
    }
    same = {hf: fields[megatron] for megatron, hf in SAME_NUMBER.items() if megatron != "ffn_hidden_size"}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **same,
        "hidden_act": "silu",
        "rope_theta": fields["rotary_base"],
        "rope_parameters": {"rope_theta": fields["rotary_base"], "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
