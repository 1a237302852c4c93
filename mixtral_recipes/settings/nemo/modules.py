"""NeMo's module paths under our own name: ``mixtral_recipes.collections.llm.recipes.mixtral_8x7b`` and the like.

They have no files. A module of the table in `names.py` is made when it is imported, and hands out what the module that
stands for it has; so changing ``nemo`` to ``mixtral_recipes`` in a script's imports is enough.
"""

import importlib
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.settings.nemo.names import ELSEWHERE, MODULES, NAMES
from mixtral_recipes.settings.nemo.rules import Base, Ignored, Only, Renamed

_PACKAGE = "mixtral_recipes"


class NotHere(RecipeError, ImportError):
    """A name of NeMo's that is not available; the text says what replaces it."""


class NotNeeded:
    """Stands for a class of NeMo's that has nothing to do here."""

    why = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(f"{type(self).__name__} has no effect: {self.why}.", MixtralRecipesWarning, stacklevel=2)


def of_nemo(name: str) -> Any:
    """What an entry of `NAMES` is here: a stand-in, or what replaces it under another name.

    Raises:
        NotHere: it is not available.
        AttributeError: there is no such entry.
    """
    rule = NAMES.get(name)
    if isinstance(rule, Only):
        raise NotHere(f"{name} is not available in mixtral-recipes: {rule.why}.")
    if isinstance(rule, Renamed):
        return getattr(importlib.import_module(_PACKAGE), rule.to)
    if isinstance(rule, Ignored):
        return _made(name, (NotNeeded,), why=rule.why)
    if isinstance(rule, Base):
        return _made(name, (), __doc__="To derive from.")
    raise AttributeError(name)


def _made(name: str, bases: tuple[type, ...], **body: str) -> type:
    """A class, kept under its name, so that recipes with it can be stored."""
    if name not in globals():
        globals()[name] = type(name, bases, {"__module__": __name__, **body})
    return globals()[name]


def attribute(module: str, name: str, *, alone: bool = False) -> Any:
    """A name of one of NeMo's modules.

    Args:
        module: The module, below ``nemo.``.
        name: The name.
        alone: Whether to look only in the table, and not in our modules.

    Raises:
        NotHere: it is one that is not available.
        AttributeError: the module has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    if f"{module}.{name}" in MODULES and not alone:
        return importlib.import_module(f"{_PACKAGE}.{module}.{name}")
    if module == "utils" and name == "logging":
        import logging

        return logging.getLogger("nemo")
    if name in NAMES:
        return of_nemo(name)
    if alone:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}; {ELSEWHERE['']}")
    package = importlib.import_module(_PACKAGE)
    ours = importlib.import_module(f"{_PACKAGE}.{MODULES[module]}".rstrip("."))
    for holder in (ours, package):
        try:
            return getattr(holder, name)
        except AttributeError:
            continue
    raise AttributeError(f"module {_PACKAGE}.{module!r} has no attribute {name!r}")


class Loader:
    """Makes a module that hands out the names of the one that stands for it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, f"Stands for nemo.{spec.name.removeprefix(f'{_PACKAGE}.')}.")

    def exec_module(self, module: ModuleType) -> None:
        nemo = module.__name__.removeprefix(f"{_PACKAGE}.")
        module.__dict__["__getattr__"] = lambda name: attribute(nemo, name)


def __getattr__(name: str) -> Any:
    """Stand-ins, for recipes that name one."""
    if isinstance(NAMES.get(name), Base | Ignored):
        return of_nemo(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
