"""The page for those who come from NeMo says what the table says."""

import importlib.util
from pathlib import Path
from typing import Any

from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.names import NAMES

ROOT = Path(__file__).resolve().parents[3]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("write_nemo_guide", ROOT / "scripts" / "write_nemo_guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_current() -> None:
    page = script()
    assert page.PAGE.read_text() == page.text(), "run python scripts/write_nemo_guide.py"


def test_every_argument_and_name_is_on_it() -> None:
    text = script().PAGE.read_text()
    for name, call in CALLS.items():
        assert f"`{name}`" in text
        assert all(argument in text for argument in call.names)
    assert all(f"`{name}`" in text for name in NAMES)
