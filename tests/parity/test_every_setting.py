"""Whatever a recipe sets of Megatron, a Mixtral that its files describe is trained, or it is refused beforehand."""

import contextlib
import dataclasses
import math
import os
import re
import typing
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import with_topology
from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.rules import Ignored, refusal
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.ranges import out_of_range
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.model import check_megatron_config
from tests.distributed.harness import RankFailed, launch
from tests.distributed.small_run import Case, _initialize, fill, relative_error, small_config, train
from tests.parity.hf_mixtral import tokens

REFUSALS = (ValueError, AssertionError, NotImplementedError, RuntimeError)  # Megatron's own
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


def settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of one of Megatron's configurations with other values, without what is refused as it is made."""
    rules = CALLS[type(config).__name__].rules
    for field in dataclasses.fields(config):
        rule = rules.get(field.name)
        for value in others(field, getattr(config, field.name)):
            wrong = refusal(rule, field.name, value) if rule is not None else out_of_range("", field.name, value)
            if not isinstance(rule, Ignored) and not wrong:
                with contextlib.suppress(*REFUSALS):
                    dataclasses.replace(config, **{field.name: value})
                    yield field.name, value


def of_the_model() -> Iterator[tuple[str, Any]]:
    """Likewise of the model's, without what is refused before it is built."""
    trainer = Trainer(accelerator="cpu", plugins=MegatronMixedPrecision(precision="32"), devices=1)
    for name, value in settings(small_config(num_layers=2)):
        with contextlib.suppress(RecipeError):
            check_megatron_config(small_config(num_layers=2, **{name: value}), trainer)
            yield name, value


def other_models() -> tuple[int, set[str]]:
    """How many of the model's settings ran, and those under which it says something else."""
    warnings.simplefilter("ignore")
    _initialize(Topology())
    ran, different, expected = 0, set(), logits()
    for name, value in of_the_model():
        found, ran = logits(**{name: value}), ran + 1
        if not relative_error(found, expected) < 1e-5:
            different.add(name)
    return ran, different


def steps() -> tuple[int, dict[str, str]]:
    """With how many settings steps were made, and how they failed with others; in bf16 where they are the model's."""
    warnings.simplefilter("ignore")
    parts = {"ddp": DistributedDataParallelConfig(), "optimizer": OptimizerConfig(lr=1e-3)}
    cases = {
        f"{part}.{name}={value}": Case(model={"num_layers": 2}, steps=2, **{part: {name: value}})
        for part, config in parts.items()
        for name, value in settings(config)
    } | {
        f"model.{name}={value}": Case(
            model={"num_layers": 2, name: value}, steps=1, precision={"precision": "bf16-mixed"}
        )
        for name, value in of_the_model()
    }
    ran, failed = 0, {}
    for said, case in cases.items():
        try:
            losses = train(case).losses
        except RecipeError:
            continue
        except Exception as error:
            failed[said] = repr(error)
        else:
            ran += 1
            if not all(map(math.isfinite, losses)):
                failed[said] = f"losses {losses}"
    return ran, failed


def with_the_users_variables() -> Tensor:
    """What the tests' model says where two attention kernels of Transformer Engine are switched off."""
    _initialize(Topology())
    os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}
    for backend in AttnBackend.unfused, AttnBackend.auto:
        logits(attention_backend=backend)
    del os.environ["NVTE_FLASH_ATTN"], os.environ["NVTE_FUSED_ATTN"]
    return logits(attention_backend=AttnBackend.fused)


def test_it_is_a_mixtral_or_refused() -> None:
    ((ran, different),) = launch(1, other_models)
    assert ran > 80
    assert different == DIFFERENT.keys()


def test_it_trains_or_is_refused() -> None:
    ((ran, failed),) = launch(1, steps)
    assert failed == {}
    assert ran > 100


def test_the_variables_of_kernels_that_are_not_there_change_nothing() -> None:
    assert launch(1, with_the_users_variables)[0].isfinite().all()


def test_a_reduction_that_megatron_refuses_is_told() -> None:
    """Where the two contradict each other only once precision has had its say."""
    patterns = {"param_name_patterns_for_fp32_local_accumulation": ("router",)}
    with pytest.raises(RankFailed, match=r"RecipeError: Megatron-Core refuses trainer\.strategy\.ddp: Only"):
        launch(1, train, Case(ddp=patterns, precision={"grad_reduce_in_fp32": True}))
