"""Checks of a whole recipe before anything is built or queued."""

import warnings
from typing import Any

import fiddle as fdl

from mixtral_recipes.errors import MixtralRecipesWarning
from mixtral_recipes.layout.repair import check_recipe_layout
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.training.watch import callbacks


def preflight(recipe: Any) -> None:
    """Refuse a recipe that cannot run, and warn of settings that have no effect.

    Raises:
        RecipeError: every setting of a wrong type; every broken rule of the layout and the nearest one that breaks
            none; or a setting that no machine runs (precision, overlap).
    """
    for notice in check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe)):
        warnings.warn(notice, MixtralRecipesWarning, stacklevel=2)
    check_recipe_layout(recipe.model, recipe.trainer, recipe.data)
    plugins: Any = fdl.build(recipe.trainer.plugins)
    plugins.check()
    checked = [fdl.build(c) for c in recipe.trainer.callbacks or [] if hasattr(getattr(c, "__fn_or_cls__", c), "check")]
    callbacks.call(checked, "check", Topology.of(recipe.trainer))
