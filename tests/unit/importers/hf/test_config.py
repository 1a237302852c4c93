"""config.json <-> Megatron fields."""

import copy
import json
import re
from typing import Any

import pytest

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config

# mistralai/Mixtral-8x7B-v0.1's config.json.
EIGHT_7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_mixtral_8x7b() -> None:
    fields = hf_config.to_megatron(EIGHT_7B)
    assert fields == {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "moe_ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "layernorm_epsilon": 1e-5,
        "init_method_std": 0.02,
        "attention_dropout": 0.0,
        "moe_aux_loss_coeff": 0.02,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rotary_base": 1e6,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False,
        "moe_router_pre_softmax": False,
    }


def test_there_and_back() -> None:
    fields = hf_config.to_megatron(EIGHT_7B)
    back = hf_config.from_megatron(fields)
    assert hf_config.to_megatron(json.loads(json.dumps(back))) == fields
    assert {key: back[key] for key in EIGHT_7B if key != "transformers_version"} == {
        key: value for key, value in EIGHT_7B.items() if key != "transformers_version"
    }


def test_megatron_may_leave_sizes_out() -> None:
    fields = hf_config.to_megatron(EIGHT_7B) | {"moe_ffn_hidden_size": None, "kv_channels": None}
    back = hf_config.from_megatron(fields | {"num_query_groups": None})
    assert (back["intermediate_size"], back["head_dim"], back["num_key_value_heads"]) == (14336, 128, 32)


def test_defaults_are_those_of_transformers() -> None:
    from transformers import MixtralConfig

    theirs = MixtralConfig()
    for field, value in hf_config.DEFAULTS.items():
        expected = theirs.default_theta if field == "rope_theta" else getattr(theirs, field)
        assert value == expected, field


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5.0},
        {"rope_scaling": None, "rope_theta": 1e4},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5.0}},
    ],
)
def test_rope_base(rope: dict[str, Any]) -> None:
    from transformers import MixtralConfig

    config = {key: value for key, value in EIGHT_7B.items() if key != "rope_theta"} | rope
    assert hf_config.to_megatron(config)["rotary_base"] == 1e4
    theirs: Any = MixtralConfig(**copy.deepcopy(rope))
    assert theirs.rope_parameters["rope_theta"] == 1e4


def test_both_spellings_of_the_expert_count() -> None:
    config = {key: value for key, value in EIGHT_7B.items() if key != "num_local_experts"}
    assert hf_config.to_megatron(config | {"num_experts": 4})["num_moe_experts"] == 4


def test_refusal_is_one_line() -> None:
    with pytest.raises(CheckpointError) as caught:
        hf_config.to_megatron(EIGHT_7B | {"sliding_window": 4096})
    assert "sliding_window=4096" in str(caught.value)
    assert "Released Mixtral models have null" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("rms_norm_eps", "1e-5", "rms_norm_eps='1e-5' must be a number from 0 to 1"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0 must be a number from 0 to 1"),
        ("rms_norm_eps", None, "rms_norm_eps=None must be a number"),
        ("attention_dropout", 1.5, "attention_dropout=1.5 must be a number from 0 to 1"),
        ("router_aux_loss_coef", True, "router_aux_loss_coef=True must be a number"),
        ("initializer_range", float("nan"), "initializer_range=nan must be a number"),
        ("head_dim", 127, "head_dim=127 must be even"),
    ],
)
def test_numbers_that_no_model_has(field: str, value: object, told: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(told)):
        hf_config.check(EIGHT_7B | {field: value})


@pytest.mark.parametrize(("experts", "chosen"), [(8, 1), (1, 1), (8, 8)])
def test_any_number_of_chosen_experts_is_taken(experts: int, chosen: int) -> None:
    fields = hf_config.to_megatron(EIGHT_7B | {"num_local_experts": experts, "num_experts_per_tok": chosen})
    assert (fields["num_moe_experts"], fields["moe_router_topk"]) == (experts, chosen)
    assert fields["moe_router_pre_softmax"] is False
