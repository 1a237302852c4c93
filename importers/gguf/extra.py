"""The packages that GGUF needs, which are not installed with the rest."""

import importlib
from typing import Any

from mixtral_recipes.errors import EnvironmentProblem


def package(name: str) -> Any:
    """A package of the extra ``gguf``: ``gguf`` (names, layout, quantizers) or ``cyllama`` (llama.cpp).

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"GGUF needs the package {name}, which is not installed; run `pip install 'mixtral-recipes[gguf]'`."
        ) from error
