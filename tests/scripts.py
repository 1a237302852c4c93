"""The scripts of this project as modules, for the tests of what they write."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "scripts"


def script(name: str) -> Any:
    """A file of ``scripts/``, imported."""
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
