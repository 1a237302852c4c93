"""One factory makes every recipe: its functions have each recipe's own defaults, names and registrations."""

import inspect
import json
from typing import Any

import catalogue
import pytest
from nemo_run.config import get_type_namespace

import mixtral_recipes as llm
from mixtral_recipes import embedded
from mixtral_recipes.layout.shapes import MIXTRAL_TINY
from mixtral_recipes.models.config import MixtralConfigTiny
from mixtral_recipes.recipes import catalog, family

FUNCTIONS = ("model", "trainer", "pretrain_recipe", "finetune_recipe")


def defaults(function: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", catalog.names())
def test_a_signature_shows_the_recipes_own_layout(name: str) -> None:
    layout, module = catalog.entry(name).layout("pretrain"), getattr(llm, name)
    shown = defaults(module.trainer)
    sizes = layout.topology
    assert (shown["tensor_parallelism"], shown["pipeline_parallelism"], shown["virtual_pipeline_parallelism"]) == (
        sizes.tensor_model_parallel_size,
        sizes.pipeline_model_parallel_size,
        sizes.virtual_pipeline_model_parallel_size,
    )
    assert (shown["context_parallelism"], shown["expert_parallelism"], shown["expert_tensor_parallelism"]) == (
        sizes.context_parallel_size,
        sizes.expert_model_parallel_size,
        sizes.expert_tensor_parallel_size,
    )
    assert (shown["num_nodes"], shown["num_gpus_per_node"]) == (layout.num_nodes, layout.num_gpus_per_node)
    for function in (module.pretrain_recipe, module.finetune_recipe):
        assert defaults(function)["precision"] == catalog.entry(name).precisions[0]


@pytest.mark.parametrize("name", catalog.names())
def test_functions_are_the_modules_own_and_documented(name: str) -> None:
    module = getattr(llm, name)
    for function in FUNCTIONS:
        own, shared = getattr(module, function), getattr(family.Recipe, function)
        assert (own.__name__, own.__module__) == (function, module.__name__)
        assert own.__doc__ == shared.__doc__
        assert list(inspect.signature(own).parameters) == list(inspect.signature(shared).parameters)[1:]
        assert own.__annotations__ == shared.__annotations__


@pytest.mark.parametrize("name", catalog.names())
def test_a_wrong_argument_is_pythons_own_error(name: str) -> None:
    with pytest.raises(TypeError, match=r"pretrain_recipe\(\) got an unexpected keyword argument 'performance_mod'"):
        getattr(llm, name).pretrain_recipe(performance_mod=True)


def test_recipes_do_not_share_their_defaults() -> None:
    assert llm.mixtral_8x7b.model() != llm.mixtral_8x22b.model()
    assert defaults(llm.mixtral_8x7b.trainer) != defaults(llm.mixtral_8x7b_64k.trainer)
    assert llm.mixtral_8x7b_64k.model().config.seq_length == 65536  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", catalog.names())
def test_nemo_runs_command_line_finds_the_functions(name: str) -> None:
    module = getattr(llm, name)
    assert catalogue._get((get_type_namespace(llm.MixtralModel), name))() == module.model()
    assert catalogue._get((get_type_namespace(llm.Trainer), name))() == module.trainer()
    for task, function in (("pretrain", module.pretrain_recipe), ("finetune", module.finetune_recipe)):
        assert catalogue._get((f"mixtral_recipes.api.{task}", name)) is function


def test_the_tiny_models_sizes_are_the_embedded_models() -> None:
    published = json.loads((embedded.resolve("embedded://mixtral_tiny") / "config.json").read_text())
    assert published["vocab_size"] == MIXTRAL_TINY.vocab_size
    assert published["max_position_embeddings"] == MIXTRAL_TINY.max_position_embeddings
    assert published["rope_theta"] == MixtralConfigTiny.rotary_base
    assert published["num_hidden_layers"] == MIXTRAL_TINY.num_layers
    assert published["hidden_size"] == MIXTRAL_TINY.hidden_size
    assert published["intermediate_size"] == MIXTRAL_TINY.ffn_hidden_size


@pytest.mark.parametrize(("devices", "experts"), [(1, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("make", [llm.mixtral_tiny.finetune_recipe, llm.mixtral_tiny.pretrain_recipe])
def test_the_tiny_recipe_spreads_its_experts_over_the_devices_there_are(make: Any, devices: int, experts: int) -> None:
    assert make(num_gpus_per_node=devices).trainer.strategy.expert_model_parallel_size == experts
