"""Every argument of NeMo's classes and functions is taken, warned about or refused, as the table says."""

import contextlib
import dataclasses
import enum
import importlib
import inspect
import typing
import warnings
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch

import mixtral_recipes as llm
from mixtral_recipes import api
from mixtral_recipes.errors import CheckpointError, LaunchError, MixtralRecipesWarning, RecipeError
from mixtral_recipes.settings import classes
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.conformity import annotation, default, options
from mixtral_recipes.settings.nemo.arguments import CALLS, rules_of
from mixtral_recipes.settings.nemo.rules import Ignored, Keys, Only, Renamed

# What must be given besides the argument under test.
NEEDED: dict[str, dict[str, Any]] = {
    "NsysCallback": {"start_step": 1, "end_step": 2},
    "PytorchProfilerCallback": {"start_step": 1, "end_step": 2},
    "AutoTokenizer": {"pretrained_model_name": "embedded://mixtral_tiny"},
    "get_nmt_tokenizer": {"library": "huggingface", "model_name": "embedded://mixtral_tiny"},
    "MegatronDataSampler": {"seq_len": 32},
    "EvaluationTarget": {"api_endpoint": None},
    "NsysPlugin": {"start_step": 1, "end_step": 2},
    "MemoryProfilePlugin": {"dir": "profile"},
    "WandbPlugin": {"name": "run", "logger_fn": lambda name: None},
    "export_ckpt": {"path": "nowhere"},
    "evaluate": {"target_cfg": "nowhere"},
    "generate": {"path": "nowhere", "prompts": ["Hello"]},
}
MEGATRONS = ("DistributedDataParallelConfig", "OptimizerConfig")  # taken as they are, listed with their exceptions
PLUGINS = "mixtral_recipes.executors.plugins"
STRANGE = object()  # a value no rule is silent about
# One of each type a setting has.
VALUES = (True, False, 7, 7.5, "strange", ["strange"], [7, 7], {"unheard_of": 1}, torch.float64, torch.sin, STRANGE)
CASES = [(name, argument) for name, call in CALLS.items() for argument in call.names if name not in MEGATRONS]


def ours(name: str) -> Any:
    if name.endswith("Plugin"):
        return getattr(importlib.import_module(PLUGINS), name)
    return getattr(llm, name)


def settings_of(target: Any) -> set[str]:
    """What our own class or function has of that name."""
    if dataclasses.is_dataclass(target):
        return {field.name for field in dataclasses.fields(target)}
    return set(inspect.signature(inspect.unwrap(target)).parameters)


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[".".join(case) for case in CASES])
def test_what_the_table_says_of_an_argument_happens(name: str, argument: str) -> None:
    target, rule = ours(name), rules_of(ours(name)).get(argument)
    own, needed = settings_of(target), NEEDED.get(name, {})
    assert argument in inspect.signature(target).parameters
    if rule is None:
        assert argument in own, "does what it did, but nothing here has that name"
    elif isinstance(rule, Renamed):
        assert rule.to in own
        assert getattr(target(**needed, **{argument: 7}), rule.to) == 7
    elif argument in own:
        why = "unheard_of has no effect" if isinstance(rule, Keys) else rule.why
        told = [
            text for value in values_of(target, argument) for text in told_of_config(target, needed | {argument: value})
        ]
        both = (default(target, argument), *getattr(rule, "quiet", ()))  # NeMo's recipes have either
        nothing_to_tell = True in both and False in both
        assert nothing_to_tell or any(f"part.{argument}" in text and why in text for text in told), told
    elif isinstance(rule, Only):
        with pytest.raises(RecipeError, match=rf"{name}\.{argument}=.* is not supported \(only .* is\): "):
            target(**needed, **{argument: STRANGE})
        for allowed in (rule.value, *rule.also):
            assert told_by(target, needed | {argument: allowed}) == []
    elif isinstance(rule, Ignored):
        (told,) = told_by(target, needed | {argument: STRANGE})
        assert told.startswith(f"{name}.{argument}=")
        assert f" has no effect: {rule.why}." in told
        for quiet in rule.quiet:
            assert told_by(target, needed | {argument: quiet}) == []


def values_of(target: Any, argument: str) -> list[Any]:
    """Values of every type an argument may have: its own words and members too."""
    allowed = options(annotation(target, argument))
    words = [
        word for option in allowed if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)
    ]
    members = [member for option in allowed if isinstance(option, enum.EnumType) for member in option]
    return [*VALUES, *words, *members]


def finetune(part: Any) -> None:
    """Stands for a recipe with one part."""


def told_by(target: Any, given: dict[str, Any]) -> list[str]:
    """The warnings of a call; functions that would go on to work stop at what they lack."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with contextlib.suppress(CheckpointError, LaunchError):
            target(**given)
    return [str(warning.message) for warning in found if warning.category is MixtralRecipesWarning]


def told_of_config(target: Any, given: dict[str, Any]) -> list[str]:
    """The notices and refusals of a config."""
    try:
        return check_settings(finetune, {"part": run.Config(target, **given)})
    except RecipeError as refused:
        return [str(refused)]


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.order and call.order[0] != "*"])
def test_positions_are_nemos(name: str) -> None:
    parameters = inspect.signature(ours(name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert tuple(positional)[: len(CALLS[name].order)] == CALLS[name].order


def test_the_table_is_of_names_that_exist() -> None:
    for name in CALLS:
        assert name in {**classes.PUBLIC, **classes.THEIRS} or hasattr(importlib.import_module(PLUGINS), name)


@pytest.mark.parametrize("name", [name for name in CALLS if name in classes.OURS])
def test_configs_take_what_classes_take_and_are_checked_before_a_job(name: str) -> None:
    target = ours(name)
    for argument, rule in rules_of(target).items():
        if argument in settings_of(target) or not isinstance(rule, Only):
            continue
        config = run.Config(target, **NEEDED.get(name, {}), **{argument: STRANGE})
        with pytest.raises(RecipeError, match=f"part.{argument}=.*is not supported"):
            check_settings(finetune, {"part": config})


def test_training_functions_have_nemos_order_and_return_the_runs_folder() -> None:
    for function in (api.train, api.pretrain, api.finetune, api.validate):
        assert inspect.signature(function).return_annotation is Path
        assert list(inspect.signature(function).parameters)[:6] == [
            "model",
            "data",
            "trainer",
            "log",
            "resume",
            "optim",
        ]


def test_the_same_setting_under_two_names_is_refused() -> None:
    with pytest.raises(RecipeError, match="are the same setting"):
        llm.MegatronMixedPrecision("16-mixed", fp16_loss_scale=2.0, loss_scale=4.0)


def test_ranks_of_a_job_do_not_repeat_what_the_command_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_ATTEMPT_DIR", "somewhere")
    assert told_by(llm.Trainer, {"num_sanity_val_steps": 2}) == []


def test_an_argument_that_nobody_has_is_told_with_whose_it_is() -> None:
    with pytest.raises(TypeError, match=r"^MegatronStrategy: got an unexpected keyword argument 'ckpt_include'$"):
        llm.MegatronStrategy(ckpt_include=True)  # pyright: ignore[reportCallIssue]


def test_nemos_default_reduction_is_megatrons() -> None:
    assert llm.MegatronStrategy(ddp="megatron") == llm.MegatronStrategy()
