"""Checks of a whole recipe before anything is built or queued."""

from typing import Any

import fiddle as fdl

from mixtral_recipes.layout.repair import check_layout
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.training.watch import callbacks


def preflight(recipe: Any) -> None:
    """Refuse a recipe that cannot run.

    Raises:
        RecipeError: every broken rule of the layout and the nearest one that breaks none; or a setting that no machine
            runs (precision, overlap).
    """
    topology = Topology.of(recipe.trainer)
    batch = BatchShape.of(recipe.data, fp8=bool(recipe.trainer.plugins.fp8))
    check_layout(topology, ModelShape.of(recipe.model.config), batch)
    plugins: Any = fdl.build(recipe.trainer.plugins)
    plugins.check()
    checked = [fdl.build(c) for c in recipe.trainer.callbacks or [] if hasattr(getattr(c, "__fn_or_cls__", c), "check")]
    callbacks.call(checked, "check", topology)
