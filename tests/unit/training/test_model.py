"""What of Megatron's configuration a run refuses before it starts."""

import warnings
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfigTiny
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.model import check_megatron_config

TRAINER = Trainer(accelerator="cpu", plugins=MegatronMixedPrecision(precision="32"))


@pytest.mark.parametrize(
    "fields",
    [
        {"cuda_graph_impl": "local"},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn", "moe_router"]},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "attn"},
        {"cuda_graph_impl": "full_iteration"},
        {"cuda_graph_modules": ["attn"]},  # without effect
        {"enable_cuda_graph": True},
        {"external_cuda_graph": True},
    ],
)
def test_cuda_graphs_are_refused_rather_than_left_out(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of the older names
        config = MixtralConfigTiny(**fields)
    with pytest.raises(RecipeError, match="CUDA graphs are not captured here"):
        check_megatron_config(config, TRAINER)


def test_what_was_not_asked_for_is_not_refused() -> None:
    check_megatron_config(MixtralConfigTiny(), TRAINER)
