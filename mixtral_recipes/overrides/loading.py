"""From a recipe's name to its configuration."""

import contextlib
import difflib
import importlib
import inspect
import traceback
from collections.abc import Iterator
from typing import Any

import fiddle as fdl

from mixtral_recipes.errors import MixtralRecipesError, RecipeError, in_short, nearest
from mixtral_recipes.recipes import catalog
from mixtral_recipes.settings.classes import TASKS


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
        raise RecipeError(f"unknown task {task!r}.{nearest(task, catalog.TASKS)}")
    module = importlib.import_module(f"mixtral_recipes.recipes.{catalog.entry(recipe_name).name}")
    return getattr(module, f"{task}_recipe")


def load_own(path: str, task: str | None = None, **arguments: Any) -> Any:
    """Import a function of the user's own and call it. A person typed its name: what a file says never gets here.

    Args:
        path: ``MODULE.FUNCTION``.
        task: ``pretrain`` or ``finetune``; None uses the function's.
        **arguments: The function's arguments.

    Returns:
        The recipe, a run.Partial.

    Raises:
        RecipeError: there is no such function, it does not take the arguments, or it makes no recipe for the task.
    """
    from mixtral_recipes.executors.nemo_run_jobs import as_text

    function = _own_function(path)
    parameters = inspect.signature(function).parameters.values()
    known = (
        arguments if any(each.kind is each.VAR_KEYWORD for each in parameters) else [each.name for each in parameters]
    )
    for name in arguments:
        if name not in known:
            raise RecipeError(f"{path} has no argument {name!r}; add one, or **arguments that it passes on to ours.")
    with _blamed(path):
        recipe = function(**arguments)
    made = fdl.get_callable(recipe) if isinstance(recipe, fdl.Partial) else None
    if made is None or made.__module__ != "mixtral_recipes.api" or made.__name__ not in TASKS:
        raise RecipeError(
            f"{path} returned {type(recipe).__name__}, not a recipe; return one of ours with your changes."
        )
    if task is not None and made.__name__ != task:
        raise RecipeError(f"{path} returns a recipe for {made.__name__}, not for {task}.")
    return as_text(recipe)


def _own_function(path: str) -> Any:
    catalog.refuse_call(path)
    module_name, _, name = path.rpartition(".")
    close = difflib.get_close_matches(module_name, catalog.names(), n=1)
    ours = f" Did you mean the recipe {close[0]!r}?" if close else ""
    try:
        with _blamed(path):
            module = importlib.import_module(module_name)
    except RecipeError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or not f"{module_name}.".startswith(f"{cause.name}."):
            raise
        raise RecipeError(
            f"recipe {path}: {in_short(cause)}; name a function of your own as MODULE.FUNCTION, in a "
            f"package that is installed or on PYTHONPATH.{ours}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if inspect.isroutine(value)]
        raise RecipeError(f"recipe {path}: {module_name} has no function {name!r}.{nearest(name, functions)}")
    return function


@contextlib.contextmanager
def _blamed(path: str) -> Iterator[None]:
    """Say of an error in the user's own code where it is."""
    try:
        yield
    except MixtralRecipesError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}:{frame.lineno})"
        raise RecipeError(f"recipe {path}: {type(error).__name__}: {in_short(error)}{place}") from error
