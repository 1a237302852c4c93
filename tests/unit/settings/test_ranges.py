"""Numbers no training can use are refused by the setting's name, from text, from files and from Python alike."""

import dataclasses
import math

import pytest
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from mixtral_recipes.api import finetune
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.overrides import loading, outline_paths
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.recipes.outline import Question, outline
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.conformity import annotation, conforms
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
    "model.config.moe_aux_loss_coeff": ("nan", "inf", "-1"),
    "model.config.moe_z_loss_coeff": ("nan", "inf"),
    "model.config.activation_offload_fraction": ("nan", "-inf"),  # no range of its own
    "model.config.hidden_size": ("0", "9" * 30),
    "model.config.num_layers": ("1000000000",),
    "model.config.rotary_base": ("0", "inf"),
    "model.config.attention_dropout": ("1.5",),
    "model.config.hidden_dropout": ("-0.1", "1"),
    "peft.dim": ("0",),
    "peft.alpha": ("0", "nan"),
    "peft.dropout": ("-1", "1.0"),
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
        number = int(value) if value.isdigit() else float(value)
        assert "is not allowed; it must be a finite number" in (out_of_range(path, name, number) or "")


def test_what_is_used() -> None:
    used = {
        "lr": 1e-4,
        "dropout": 0.0,
        "alpha": 16,
        "warmup_steps": 0,
        "seed": 0,
        "hidden_dropout": 0.99,
        "clip_grad": 0.0,
    }
    assert not any(out_of_range(name, name, value) for name, value in used.items())
    assert out_of_range("x", "grad_norm_skip_threshold", math.inf) is None  # Megatron's default
    assert out_of_range("x", "of no table", math.inf)
    assert out_of_range("x", "of no table", math.nan)


@pytest.mark.parametrize("path", [path for path in REFUSED if not path.startswith("peft.")])
def test_in_outline_as_in_a_whole_recipe(path: str) -> None:
    with pytest.raises(RecipeError, match="is not allowed; it must be a finite number"):
        outline_paths.apply(outline(Question("mixtral_tiny", "pretrain")), [f"{path}={REFUSED[path][0]}"])


def test_every_number_among_several() -> None:
    coefficients = [0.1, math.nan]
    assert "moe_aux_loss_coeff[1]=nan" in (out_of_range("moe_aux_loss_coeff", "moe_aux_loss_coeff", coefficients) or "")
    assert out_of_range("max_steps", "max_steps", 10**5000)
    assert "at least 1 and at most 9,223,372,036,854,775,807" in (out_of_range("max_steps", "max_steps", 1 << 63) or "")


def test_a_number_is_none_of_text() -> None:
    """Each setting whose default is a number states a type, so that no text reaches it."""
    parts = {MixtralConfig: MixtralConfig(), OptimizerConfig: OptimizerConfig()}
    fields = [(kind, field.name) for kind, made in parts.items() for field in dataclasses.fields(made)]
    numbers = [(kind, name) for kind, name in fields if type(getattr(parts[kind], name)) in (int, float)]
    assert len(numbers) > 80
    assert not [name for kind, name in numbers if conforms("nan", annotation(kind, name))]
