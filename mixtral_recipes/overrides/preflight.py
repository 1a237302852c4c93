"""Checks of a whole recipe before anything is built or queued."""

import copy
import dataclasses
import warnings
from typing import Any

import fiddle as fdl

from mixtral_recipes.data.modules.lightning import as_data_module, refuse_other_data
from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.layout.repair import check_layout
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.planner import cards, fit
from mixtral_recipes.planner.cards import Card
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.training.model import check_megatron_config, refusals_told, seen_model
from mixtral_recipes.training.watch import callbacks


def preflight(recipe: Any, hardware: str = "h100") -> None:
    """Refuse a recipe that cannot run, and warn of settings that have no effect.

    Args:
        recipe: The recipe.
        hardware: The card whose memory it must fit; not asked where the recipe runs without a GPU.

    Raises:
        RecipeError: every setting of a wrong type; a model, checkpoint and tokenizer that do not fit together, or that
            Megatron-Core refuses; every broken rule of the layout and a layout that breaks none and fits; what takes
            more memory than there is; or a setting that no machine runs (precision, overlap).
    """
    refuse_other_data(getattr(recipe, "data", None))
    for notice in check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe)):
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=2)
    recipe = copy.copy(recipe)
    recipe.data = as_data_module(fdl.build(recipe.data))  # one's own may state its batch only once it is built
    with refusals_told():
        model: Any = fdl.build(recipe.model)
    trainer, resume, peft, tokenizer = (_built(recipe, name) for name in ("trainer", "resume", "peft", "tokenizer"))
    seen = seen_model(model, trainer, resume or AutoResume(), peft, None if tokenizer == "model" else tokenizer)
    plugins: Any = fdl.build(recipe.trainer.plugins)
    job = dataclasses.replace(Workload.of(recipe), shape=ModelShape.of(seen), topk=seen.moe_router_topk)
    check_job(job, cards.card(hardware), on_gpu=recipe.trainer.accelerator == "gpu")
    check_megatron_config(seen, trainer)
    plugins.check()
    checked = [fdl.build(c) for c in recipe.trainer.callbacks or [] if hasattr(getattr(c, "__fn_or_cls__", c), "check")]
    callbacks.call(checked, "check", Topology.of(recipe.trainer))


def check_job(job: Workload, card: Card, *, on_gpu: bool = True) -> None:
    """Refuse a job whose layout cannot run or does not fit, and warn of one that barely does.

    Args:
        job: The job.
        card: The GPU.
        on_gpu: Whether memory is a GPU's.

    Raises:
        RecipeError: all broken rules at once, or what takes too much memory; with settings that run and fit.
    """
    if not on_gpu:
        check_layout(job.topology, job.shape, job.batch)
        return
    fit.check_layout_of(job, card)
    refused = fit.refusal(job, card)
    if refused:
        raise RecipeError(refused)
    notice = fit.warning(job, card)
    if notice:
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=3)


def _built(recipe: Any, name: str) -> Any:
    part = recipe.__arguments__.get(name)
    return fdl.build(part) if isinstance(part, fdl.Buildable) else part
