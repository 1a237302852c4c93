"""Recipes: one module each, returning configs; and the parts they are made of, under NeMo's names."""

import importlib
from typing import Any

# Names NeMo's package of recipes has, besides the recipes.
_PARTS = {
    "adam": ("recipes.optim.adam", None),
    "default_log": ("recipes.log.default", "default_log"),
    "default_resume": ("recipes.log.default", "default_resume"),
    "torchrun": ("executors.torchrun", "torchrun"),
}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        module, inside = _PARTS[name]
        found = importlib.import_module(f"mixtral_recipes.{module}")
        return found if inside is None else getattr(found, inside)
    if name.startswith("mixtral_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # the recipe is there, and what it imports is not
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
