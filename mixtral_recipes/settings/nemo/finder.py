"""Lets NeMo's module paths be imported under our name. Loaded with the package, so it loads next to nothing itself."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_TOP = ("mixtral_recipes.collections", "mixtral_recipes.lightning", "mixtral_recipes.utils")


class _Finder:
    """Stands behind Python's own finders and answers for the modules of the table in `names.py`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(_TOP):
            return None
        from mixtral_recipes.settings.nemo.modules import Loader
        from mixtral_recipes.settings.nemo.names import MODULES

        if name.removeprefix("mixtral_recipes.") not in MODULES:
            return None
        return ModuleSpec(name, Loader(), is_package=True)  # pyright: ignore[reportArgumentType]


def activate() -> None:
    """Let them be imported. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # pyright: ignore[reportArgumentType]
