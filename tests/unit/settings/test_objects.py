"""Objects in a recipe become configs, so that a recipe written as NeMo's notebooks have it can be sent."""

import dataclasses
import functools
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_origin

import fiddle as fdl
import nemo_run as run
import numpy as np
import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.executors import torchrun
from mixtral_recipes.executors.nemo_run_jobs import _checked, as_text, check
from mixtral_recipes.recipes import data, finetune_default
from mixtral_recipes.recipes.log import default
from mixtral_recipes.recipes.optim import adam
from mixtral_recipes.recipes.precision import mixed_precision
from mixtral_recipes.recipes.precision.mixed_precision import bf16_mixed
from mixtral_recipes.settings.objects import as_configs, built


class Mine(llm.MockDataModule):
    def __init__(self, rows: int) -> None:
        super().__init__(global_batch_size=rows)


def parts() -> dict[str, Any]:
    config = llm.MixtralConfig8x7B(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2)
    config.freeze_router = True
    return {
        "model": llm.MixtralModel(config),
        "data": llm.MockDataModule(seq_length=32, global_batch_size=4),
        "trainer": llm.Trainer(max_steps=2, strategy=llm.MegatronStrategy(), callbacks=[llm.TimingCallback()]),
        "optim": llm.MegatronOptimizerModule(config=OptimizerConfig(lr=1e-4, bf16=True)),
        "peft": llm.LoRA(dim=64, alpha=128),
    }


def given_at_once() -> Any:
    return run.Partial(llm.finetune, **parts())  # nemo_run makes configs of them


def set_one_by_one() -> Any:
    recipe = llm.mixtral_tiny.finetune_recipe()
    for name, part in parts().items():
        setattr(recipe, name, part)
    return recipe


@pytest.mark.parametrize("make", [given_at_once, set_one_by_one])
def test_a_recipe_of_objects_comes_out_as_it_was(make: Any) -> None:
    made, sent = parts(), ZlibJSONSerializer().serialize(as_configs(make()))
    back = fdl.build(ZlibJSONSerializer().deserialize(sent)).keywords
    assert all(back[name] == made[name] for name in ("data", "trainer", "optim", "peft"))
    before, after = made["model"].config, back["model"].config
    for field in dataclasses.fields(before):
        value = getattr(before, field.name)
        assert callable(value) or getattr(after, field.name) == value, field.name
    assert after.init_method.keywords == before.init_method.keywords
    if make is set_one_by_one:
        for name in ("num_layers", "freeze_router", "vocab_size", "rotary_base"):
            assert after.is_given(name) == before.is_given(name)


def test_a_path_is_sent_as_text() -> None:
    sources = run.Config(llm.PreTrainingDataModule, paths={"train": [Path("a/b")], "validation": [Path("c")]})
    sent = ZlibJSONSerializer().serialize(as_text(run.Partial(llm.export_ckpt, path=Path("x"), output_path=sources)))
    back = ZlibJSONSerializer().deserialize(sent)
    assert (back.path, back.output_path.paths) == ("x", {"train": ["a/b"], "validation": ["c"]})


def test_a_number_of_numpy_is_sent_as_a_number() -> None:
    recipe = llm.mixtral_tiny.finetune_recipe()
    recipe.optim.config.lr = np.float64(1e-4)
    assert type(as_text(recipe).optim.config.lr) is float


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("peft", r"peft=<Partial\[LoRA\(\)\]> must be null or a LoRA; use run.Config, not run.Partial"),
        ("log", r"log=<Partial\[NeMoLogger\(\)\]> must be null or a NeMoLogger; use run.Config"),
        ("callback", r"trainer.callbacks\[0\] is a partial, which makes no object; use run.Config"),
        ("data", "data is a partial, which makes no data module; use run.Config"),
    ],
)
def test_a_partial_is_no_part_of_a_recipe(part: str, told: str) -> None:
    """It makes a function that makes the part; the job's process would be the first to notice."""
    recipe = llm.mixtral_tiny.finetune_recipe(num_gpus_per_node=1)
    if part == "callback":
        recipe.trainer.callbacks = [run.Partial(llm.TimingCallback)]
    else:
        setattr(recipe, part, run.Partial({"peft": llm.LoRA, "log": llm.NeMoLogger, "data": llm.MockDataModule}[part]))
    with pytest.raises(RecipeError, match=told):
        check(recipe, run.LocalExecutor())
    with pytest.raises(RecipeError, match=told.replace(r"<Partial\[", ".*").partition(r"\(\)")[0]):
        fdl.build(recipe)()


@pytest.mark.parametrize("path", ["trainer.callbacks[0]", "model.config.init_method"])
def test_what_no_file_defines_is_refused_with_its_path(path: str) -> None:
    class Local:
        def on_step_end(self, run: Any, metrics: Any) -> None: ...

    recipe = llm.mixtral_tiny.finetune_recipe(num_gpus_per_node=1)
    if path.startswith("model"):
        recipe.model.config.init_method = lambda tensor: tensor
    else:
        recipe.trainer.callbacks = [run.Config(Local)]
    with pytest.raises(RecipeError, match=re.escape(f"recipe.{path}: ") + ".* is a lambda, or defined within a func"):
        check(recipe, run.LocalExecutor())


def test_the_recipe_itself_is_left_alone() -> None:
    recipe = set_one_by_one()
    as_configs(recipe)
    assert isinstance(recipe.model, llm.MixtralModel)


def test_a_function_of_ones_own_is_not_lost() -> None:
    recipe = set_one_by_one()
    recipe.model = run.Config(llm.MixtralModel, config=run.Config(llm.MixtralConfig8x7B))
    recipe.model.config.init_method = functools.partial(torch.nn.init.normal_, mean=0.0, std=0.5)
    with pytest.raises(RecipeError, match=r"recipe\.model\.config\.init_method holds an object"):
        as_text(recipe)


def test_what_nobody_can_write_down_is_refused_by_its_place() -> None:
    recipe = set_one_by_one()
    recipe.data = Mine(8)
    with pytest.raises(RecipeError, match=r"recipe\.data holds an object, .*use run\.Config\(CLASS, \.\.\.\)"):
        as_text(recipe)


def test_objects_in_any_of_our_tasks_can_be_sent() -> None:
    task = run.Partial(llm.import_ckpt, model=llm.MixtralModel(llm.MixtralConfigTiny()), source="somewhere")
    added = functools.partial(_checked, lambda experiment, task, executor: ZlibJSONSerializer().serialize(task))
    back = fdl.build(ZlibJSONSerializer().deserialize(added(SimpleNamespace(jobs=[]), task, run.LocalExecutor())))
    assert back.keywords["model"].config.num_layers == llm.MixtralConfigTiny().num_layers


def test_a_notebooks_class_is_refused_before_its_job_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llm.mixtral_tiny.finetune_recipe()
    recipe.trainer.callbacks = [run.Config(type("Mine", (), {"__module__": "__main__"}))]
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(RecipeError, match=r"Mine is defined in this notebook, .*direct=True"):
        as_text(recipe)


def test_configs_are_built_inside_objects_too() -> None:
    made = built(run.Config(llm.MixtralModel, config=run.Config(llm.MixtralConfig8x7B, num_layers=2)))
    assert isinstance(made.config, llm.MixtralConfig8x7B)
    assert made.config.is_given("num_layers")
    callbacks = [run.Config(llm.TimingCallback)]
    trainer = built(llm.Trainer(max_steps=2, callbacks=callbacks, strategy=run.Config(llm.MegatronStrategy)))  # pyright: ignore[reportArgumentType]
    assert isinstance(trainer.callbacks[0], llm.TimingCallback)
    assert isinstance(trainer.strategy, llm.MegatronStrategy)
    assert trainer.max_steps == 2
    mine = Mine(4)
    assert built(mine) is mine
    assert built(made) is made


def test_autoconvert_calls_what_returns_a_config() -> None:
    @run.autoconvert
    def trainer() -> llm.Trainer:
        return llm.Trainer(devices=1, plugins=bf16_mixed())  # pyright: ignore[reportArgumentType]

    made: Any = fdl.build(trainer())
    assert made.plugins == llm.MegatronMixedPrecision(precision="bf16-mixed")


@pytest.mark.parametrize("module", [data, finetune_default, default, adam, mixed_precision, llm.mixtral_8x7b, torchrun])
def test_every_function_of_the_recipes_that_returns_a_config_is_marked(module: ModuleType) -> None:
    public = {name: value for name, value in vars(module).items() if inspect.isroutine(value) and name[0] != "_"}
    returned = {name: get_origin(inspect.signature(value).return_annotation) for name, value in public.items()}
    made = {name: public[name] for name, kind in returned.items() if kind in (run.Config, run.Partial)}
    assert made
    assert [name for name, make in made.items() if not getattr(make, "__auto_config__", False)] == []
