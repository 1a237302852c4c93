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


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        (
            run.Config(llm.MLFlowLogger, tracking_uri="https://me:s3cr3t@mlflow.example.org"),
            r"log\.mlflow\.tracking_uri",
        ),
        (run.Config(llm.WandbLogger, config={"seed": 1, "apiKey": "s3cr3t"}), r"log\.wandb\.config\.apiKey"),
        (run.Config(llm.WandbLogger, config={"see": "ftp://me:s3cr3t@host"}), r"log\.wandb\.config\.see"),
    ],
)
def test_a_secret_that_would_be_recorded(part: run.Config, setting: str) -> None:
    recipe = loading.load("mixtral_tiny", "finetune")
    setattr(recipe.log, "mlflow" if "mlflow" in setting else "wandb", part)
    with pytest.raises(RecipeError, match=setting) as refused:
        preflight(recipe)
    assert "s3cr3t" not in str(refused.value)
    recipe.data = run.Config(llm.ChatDataModule, dataset_root="https://me:s3cr3t@host/data.jsonl")
    with pytest.raises(RecipeError, match=r"data\.dataset_root: the address https://\.\.\.@ carries a password"):
        preflight(recipe)
