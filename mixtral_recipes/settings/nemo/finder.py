"""Lets NeMo's module paths be imported under our name. Loaded with the package, so it loads next to nothing itself."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_TOP = ("collections", "lightning", "utils", "export", "deploy", "core", "automodel")  # of NeMo's packages


class _Finder:
    """Stands behind Python's own finders and answers for the modules of the table in `names.py`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """A module of the table.

        Raises:
            NotHere: it is one of NeMo's others; names what replaces it.
        """
        package, _, nemo = name.partition(".")
        if package != "mixtral_recipes" or nemo.partition(".")[0] not in _TOP:
            return None
        from mixtral_recipes.settings.nemo.modules import Loader, NotHere
        from mixtral_recipes.settings.nemo.names import MODULES, instead_of

        if nemo not in MODULES:
            raise NotHere(f"nemo.{nemo} is not available in mixtral-recipes: {instead_of(nemo)}.")
        return ModuleSpec(name, Loader(), is_package=True)  # pyright: ignore[reportArgumentType]


def activate() -> None:
    """Let them be imported. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # pyright: ignore[reportArgumentType]
