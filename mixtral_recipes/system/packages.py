"""Packages that need not be installed: one that is missing is told apart from one that is there and does not load."""

import importlib
from typing import Any

from mixtral_recipes.errors import EnvironmentProblem, in_short


def package(name: str, missing: str) -> Any:
    """Import a package, or a module of one.

    Args:
        name: Its name.
        missing: What to say where it is not installed.

    Raises:
        EnvironmentProblem: it is not installed; or it is, and cannot be imported.
    """
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a package raises while it loads
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise EnvironmentProblem(missing) from error
        why = f"{type(error).__name__}: {in_short(error)}"
        raise EnvironmentProblem(f"{top} is installed but cannot be imported ({why}); reinstall it.") from error
