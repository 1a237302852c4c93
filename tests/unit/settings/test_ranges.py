"""Numbers no training can use are refused by the setting's name, from text, from files and from Python alike."""

import math

import pytest

from mixtral_recipes.api import finetune
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.ranges import out_of_range

REFUSED = {
    "optim.config.lr": ("nan", "0", "-1", "inf"),
    "optim.config.weight_decay": ("nan", "-1"),
    "optim.config.adam_eps": ("0",),
    "optim.config.adam_beta2": ("1.0", "2"),
    "optim.config.clip_grad": ("nan", "-1"),
    "optim.lr_scheduler.warmup_steps": ("-1",),
    "optim.lr_scheduler.min_lr": ("nan",),
    "model.config.layernorm_epsilon": ("0",),
    "model.config.rotary_base": ("0", "inf"),
    "model.config.attention_dropout": ("1.5",),
    "model.config.hidden_dropout": ("-0.1",),
    "peft.dim": ("0",),
    "peft.alpha": ("0", "nan"),
    "peft.dropout": ("-1",),
    "trainer.max_steps": ("0", "-5"),
    "trainer.log_every_n_steps": ("0",),
}


def test_a_recipe_with_all_of_them_names_each() -> None:
    recipe = loading.load("mixtral_tiny", "finetune", peft_scheme="lora")
    overrides.apply(recipe, [f"{path}={values[0]}" for path, values in REFUSED.items()])
    with pytest.raises(RecipeError) as caught:
        check_settings(finetune, recipe.__arguments__)
    for path in REFUSED:
        assert f"{path}=" in str(caught.value)


@pytest.mark.parametrize("path", REFUSED)
def test_each(path: str) -> None:
    name = path.rpartition(".")[2]
    for value in REFUSED[path]:
        assert "is not allowed; it must be a finite number" in (out_of_range(path, name, float(value)) or "")


def test_what_is_used() -> None:
    used = {
        "lr": 1e-4,
        "dropout": 0.0,
        "alpha": 16,
        "warmup_steps": 0,
        "seed": 0,
        "hidden_dropout": 1.0,
        "clip_grad": 0.0,
    }
    assert not any(out_of_range(name, name, value) for name, value in used.items())
    assert out_of_range("x", "of no table", math.inf) is None
    assert out_of_range("x", "of no table", math.nan)
