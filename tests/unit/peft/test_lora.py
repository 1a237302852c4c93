"""Which layers a scheme adapts, and what it refuses (numbers: tests/parity/test_peft.py and tests/distributed)."""

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.peft import ALL_LINEAR, DoRA, LoRA


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
