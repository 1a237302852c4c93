"""What every Mixtral has in common, in Megatron's words."""

from typing import Any

# What makes a model compute something that no Mixtral does: a checkpoint's weights would be another model, and
# config.json could not say what was trained. Megatron's TransformerConfig field -> Mixtral's value.
MIXTRALS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "activation_func_clamp_value", "experimental_attention_variant", "linear_attention_freq", "moe_latent_size",
            "moe_mlp_glu_interleave_size", "moe_router_force_biased",
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

# How experts' load may be balanced; several at once are a list. Under Sinkhorn the shares of the chosen experts do not
# add up to one, also once trained, and quantile balancing chooses by a bias that is no weight of a Mixtral.
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def balances_as_mixtral(kinds: Any) -> bool:
    """Whether a ``moe_router_load_balancing_type`` leaves what a trained model computes as it is."""
    return isinstance(kinds, str | list | tuple) and set([kinds] if isinstance(kinds, str) else kinds) <= set(BALANCING)
