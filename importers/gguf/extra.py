"""The packages that GGUF needs, which are not installed with the rest."""

import platform
from typing import Any

from mixtral_recipes.system import packages


def package(name: str) -> Any:
    """A package of the extra ``gguf``: ``gguf`` (names, layout, quantizers) or ``cyllama`` (llama.cpp).

    Raises:
        EnvironmentProblem: it is not installed, is not built for this machine, or cannot be imported.
    """
    missing = f"GGUF needs the package {name}, which is not installed; run `pip install 'mixtral-recipes[gguf]'`."
    if name == "cyllama" and platform.machine() != "x86_64":
        missing = (
            f"llama.cpp's package {name} has no build for {platform.machine()}: pass --no-check and choose a type that "
            "does not need it (f16, bf16, q8_0, q4_0), or export on an x86_64 machine."
        )
    return packages.package(name, missing)
