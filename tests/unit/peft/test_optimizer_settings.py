"""What the optimizer does otherwise with adapters' parameters."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes.peft.optimizer_settings import overrides
from mixtral_recipes.settings.peft import DoRA

FC1 = "decoder.layers.0.mlp.experts.linear_fc1.adapter."


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("magnitude", (2, 6), [{"wd_mult": 0.0}]),  # a gated layer's
        ("magnitude", (8, 2, 6), [{"wd_mult": 0.0}]),  # those of several experts
        ("lora_a", (4, 6), []),
        ("lora_b", (2, 6, 4), [{"max_lr": 4e-3, "min_lr": 4e-4}]),
    ],
)
def test_lengths_do_not_decay_and_b_learns_faster(name: str, shape: tuple[int, ...], expected: list[object]) -> None:
    found = overrides(DoRA(loraplus_lr_ratio=4), OptimizerConfig(lr=1e-3, min_lr=1e-4))
    parameter = torch.nn.Parameter(torch.zeros(shape))
    assert [settings for key, settings in found.items() if key.matches(parameter, FC1 + name)] == expected
