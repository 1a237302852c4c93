"""Whatever a recipe sets, it trains a Mixtral that its files describe, or is refused before anything is built."""

import dataclasses
import re
import typing
import warnings
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, with_topology
from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.rules import Ignored, refusal
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.model import check_megatron_config
from tests.distributed.harness import launch
from tests.distributed.small_run import _initialize, fill, relative_error, small_config
from tests.parity.hf_mixtral import tokens

# Settings that change what a forward pass says, and may: in config.json, or (as NeMo's) of training alone.
DIFFERENT = {
    "layernorm_epsilon": "config.json has it",
    "moe_input_jitter_eps": "noise",
    "moe_expert_capacity_factor": "tokens beyond an expert's room are dropped",
}


def others(field: "dataclasses.Field[Any]", default: Any) -> list[Any]:
    """Values of a setting that are not its default."""
    named = repr(field.type) + str(typing.get_args(field.type))
    if isinstance(default, bool):
        return [not default]
    if "Literal" in named:
        return [value for value in dict.fromkeys(re.findall(r"'(\w+)'", named)) if value != default]
    if isinstance(default, float):
        return [default + 0.3]
    if default is None:
        return [value for kind, value in (("float", 0.3), ("bool", True), ("int", 1)) if kind in named][:1]
    return []


def logits(**changes: Any) -> Tensor:
    """What the tests' model says under changed settings, its weights the same."""
    config = with_topology(small_config(num_layers=2, **changes), Topology(), calculate_per_token_loss=True)
    model = build_model(config)
    fill(model, adapters=False)
    model[0].eval()
    torch.manual_seed(3)
    ids = tokens()
    with torch.no_grad():
        return model[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None)[..., :101].float()


def every_setting() -> tuple[int, set[str]]:
    """How many settings were tried and run, and those under which the model says something else."""
    warnings.simplefilter("ignore")
    _initialize(Topology())
    trainer = Trainer(accelerator="cpu", plugins=MegatronMixedPrecision(precision="32"), devices=1)
    rules, expected = CALLS["MixtralConfig"].rules, logits()
    plain, ran, different = small_config(num_layers=2), 0, set()
    for field in dataclasses.fields(MixtralConfig):
        rule = rules.get(field.name)
        for value in others(field, getattr(plain, field.name)):
            if isinstance(rule, Ignored) or (rule is not None and refusal(rule, field.name, value)):
                continue
            try:
                config = small_config(num_layers=2, **{field.name: value})
            except (ValueError, AssertionError, NotImplementedError):  # Megatron's own
                continue
            try:
                check_megatron_config(config, trainer)
            except RecipeError:
                continue
            found, ran = logits(**{field.name: value}), ran + 1
            if not relative_error(found, expected) < 1e-5:
                different.add(field.name)
    return ran, different


def test_it_is_a_mixtral_or_refused() -> None:
    ((ran, different),) = launch(1, every_setting)
    assert ran > 100
    assert different == DIFFERENT.keys()
