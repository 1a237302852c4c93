"""What of Megatron's configuration a run refuses before it starts."""

import warnings
from typing import Any

import pytest
import torch

from mixtral_recipes import api
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import run
from mixtral_recipes.training.model import check_megatron_config, megatron_settings
from mixtral_recipes.training.watch.callbacks import MegatronCommOverlapCallback

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
    with pytest.raises(RecipeError, match="CUDA graphs are not supported"):
        check_megatron_config(config, TRAINER)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_pipeline_stages_send_each_other_what_they_compute_in(precision: str, dtype: torch.dtype) -> None:
    """A stage makes room for ``pipeline_dtype``; NeMo's recipes name bfloat16, whatever their plugins are set to."""
    stages = MegatronStrategy(pipeline_model_parallel_size=2, pipeline_dtype=torch.bfloat16)
    trainer = Trainer(devices=2, strategy=stages, plugins=MegatronMixedPrecision(precision=precision))
    assert megatron_settings(trainer, trainer.topology(), torch.device("cpu"))["model"]["pipeline_dtype"] == dtype
    parts = {"model": MixtralModel(MixtralConfigTiny()), "data": MockDataModule(), "trainer": trainer}
    assert not [notice for notice in check_settings(api.pretrain, parts) if "pipeline_dtype" in notice]
    trainer.strategy.pipeline_dtype = torch.float32
    notices = " ".join(check_settings(api.pretrain, parts))
    assert "trainer.strategy.pipeline_dtype=torch.float32 has no effect" in notices


def test_what_was_not_asked_for_is_not_refused() -> None:
    check_megatron_config(MixtralConfigTiny(), TRAINER)


def test_gradients_may_wait_where_the_ranks_machines_can_add_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = MegatronCommOverlapCallback(defer_embedding_wgrad_compute=True)
    stages = MegatronStrategy(pipeline_model_parallel_size=2)
    trainer = Trainer(accelerator="gpu", devices=2, strategy=stages, callbacks=[callback])
    check_megatron_config(MixtralConfigTiny(), trainer)
    settings = megatron_settings(trainer, trainer.topology(), torch.device("cuda"))["model"]
    assert settings["defer_embedding_wgrad_compute"]
    monkeypatch.setattr(run.kernels, "transformer_engine_usable", lambda: False)
    with pytest.raises(RecipeError, match="gradient accumulation fusion is not used"):
        run._configured(MixtralConfigTiny(), trainer.topology(), settings, None, None)
