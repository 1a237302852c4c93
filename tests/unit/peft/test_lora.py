"""Which layers a scheme adapts, and what it refuses (numbers: tests/parity/test_peft.py and tests/distributed)."""

import json

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.peft import ALL_LINEAR, DoRA, LoRA, recorded, scheme_of


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, set(ALL_LINEAR)),
        ({"target_modules": "all-linear"}, set(ALL_LINEAR)),
        ({"target_modules": "attention"}, {"linear_qkv", "linear_proj"}),
        ({"target_modules": "linear_fc1"}, {"linear_fc1"}),
        ({"target_modules": ["linear_qkv", "linear_fc2"]}, {"linear_qkv", "linear_fc2"}),
        ({"exclude_modules": ["linear_fc1", "linear_fc2"]}, {"linear_qkv", "linear_proj"}),
    ],
)
def test_targets(kind: type[LoRA], settings: dict[str, object], expected: set[str]) -> None:
    assert kind(**settings).targets() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["linear_qvk"]}, r"target_modules names 'linear_qvk'.*linear_qkv"),
        ({"target_modules": "atention"}, r"'atention'.*attention"),
        ({"exclude_modules": ["router"]}, "'router'"),
        ({"dropout_position": "middle"}, "dropout_position='middle'"),
        ({"lora_B_init_method": "xavier"}, "only 'zero'"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoRA(**settings).targets()


@pytest.mark.parametrize(
    ("scheme", "layer", "dim", "scale"),
    [
        (LoRA(dim=8, alpha=12), "linear_fc1", 8, 1.5),
        (LoRA(dim=16, alpha=8, use_rslora=True), "linear_fc1", 16, 2.0),
        (LoRA(dim=8, rank_pattern={"linear_fc1": 4}), "decoder.layers.3.mlp.experts.5.linear_fc1", 4, 8.0),
        (LoRA(dim=8, alpha=8, alpha_pattern={"linear_qkv": 2}), "decoder.layers.0.self_attention.linear_qkv", 8, 0.25),
    ],
)
def test_rank_and_scale_of_a_layer(scheme: LoRA, layer: str, dim: int, scale: float) -> None:
    assert (scheme.dim_of(layer), scheme.scale_of(layer)) == (dim, scale)


def test_a_pattern_for_a_layer_that_is_not_adapted_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"peft\.rank_pattern names 'linear_fc1', which is not adapted"):
        LoRA(target_modules="attention", rank_pattern={"linear_fc1": 4}).targets()
    with pytest.raises(RecipeError, match=r"peft\.rank_pattern\.linear_fc1=0; it must be positive"):
        LoRA(rank_pattern={"linear_fc1": 0}).targets()


@pytest.mark.parametrize("scheme", [LoRA(dim=4, rank_pattern={"linear_fc1": 2}), DoRA(alpha=3, use_rslora=True)])
def test_what_is_recorded_is_read_back(scheme: LoRA) -> None:
    assert scheme_of(json.loads(json.dumps(recorded(scheme)))) == scheme
