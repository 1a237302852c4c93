"""What preflight refuses besides layouts (those: tests/unit/test_topology.py)."""

import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import loading
from mixtral_recipes.overrides.preflight import preflight

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning")


def test_a_precision_no_machine_has() -> None:
    recipe = loading.load("mixtral_8x7b", "pretrain", precision="fp8")
    recipe.trainer.plugins.precision = "16-mixed"
    with pytest.raises(RecipeError, match=r"trainer\.plugins\.fp8='hybrid' with precision='16-mixed'"):
        preflight(recipe)


def test_overlap_settings_the_layout_cannot_run() -> None:
    recipe = loading.load("mixtral_8x7b", "pretrain")
    recipe.trainer.callbacks.append(run.Config(llm.MegatronCommOverlapCallback, overlap_p2p_comm=False))
    preflight(recipe)
    recipe.trainer.strategy.pipeline_model_parallel_size = 2
    with pytest.raises(RecipeError, match="overlap_p2p_comm=False"):
        preflight(recipe)
