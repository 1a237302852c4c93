"""The modules of a user's own that a recipe's classes and functions come from: a Slurm job takes them along."""

import dataclasses
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

_INSTALLED = {"site-packages", "dist-packages"}


def with_own_modules(executor: Any, recipe: Any) -> Any:
    """An executor that also sends the modules of a recipe that are not installed, where it packs working trees.

    Args:
        executor: A SlurmExecutor; it is not changed.
        recipe: A recipe in fiddle's form.
    """
    from mixtral_recipes.executors.packager import WorkingTreePackager

    if isinstance(packager := executor.packager, WorkingTreePackager):
        executor = executor.clone()
        modules = {*packager.modules, *own_modules(recipe, packager.roots)}  # a job's script has none, its recipe may
        executor.packager = dataclasses.replace(packager, modules=sorted(modules))
    return executor


def own_modules(recipe: Any, sent: list[str]) -> list[str]:
    """Packages (folders) and modules (files), by full path.

    Those of the recipe, and whatever else this process has loaded from beside them.

    Args:
        recipe: As for `with_own_modules`.
        sent: Folders that are sent anyway.
    """
    needed = filter(None, (_place(sys.modules.get(name)) for name in _names(recipe)))
    beside = {place.parent for place in needed} - {Path(folder).resolve() for folder in sent}
    loaded = [module for name, module in list(sys.modules.items()) if "." not in name and name != "__main__"]
    return sorted({str(place) for module in loaded if (place := _place(module)) and place.parent in beside})


def _names(recipe: Any) -> set[str]:
    """The top-level names of the modules of what a recipe calls."""
    from fiddle import daglish

    called = [getattr(value, "__fn_or_cls__", value) for value, _ in daglish.iterate(recipe)]
    names = {str(getattr(value, "__module__", "")).partition(".")[0] for value in called if callable(value)}
    return names - {"mixtral_recipes"}


def _place(module: ModuleType | None) -> Path | None:
    """A package's folder or a module's file; None of what is installed or built in."""
    found = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)][0]
    if found is None:
        return None
    place = Path(found).resolve()
    installed = _INSTALLED & set(place.parts) or place.is_relative_to(sysconfig.get_path("stdlib"))
    return None if installed else place
