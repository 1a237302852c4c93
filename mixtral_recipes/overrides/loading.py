"""From a recipe's name to its configuration."""

import importlib
import inspect
from typing import Any

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.recipes import catalog


def load(recipe_name: str, task: str, **arguments: Any) -> Any:
    """Call a recipe's function.

    Args:
        recipe_name: A name in the catalog.
        task: ``pretrain`` or ``finetune``.
        **arguments: The function's arguments, e.g. ``num_nodes=2``.

    Returns:
        The recipe, a run.Partial.

    Raises:
        RecipeError: an unknown recipe, task or argument.
    """
    function = recipe_function(recipe_name, task)
    known = list(inspect.signature(function).parameters)
    for name in arguments:
        if name not in known:
            raise RecipeError(f"{recipe_name}.{task} has no argument {name!r}.{nearest(name, known)}")
    return function(**arguments)


def recipe_function(recipe_name: str, task: str) -> Any:
    """The function that makes a recipe.

    Raises:
        RecipeError: an unknown recipe or task.
    """
    if task not in catalog.TASKS:
        raise RecipeError(f"task {task!r} is not known.{nearest(task, catalog.TASKS)}")
    module = importlib.import_module(f"mixtral_recipes.recipes.{catalog.entry(recipe_name).name}")
    return getattr(module, f"{task}_recipe")
