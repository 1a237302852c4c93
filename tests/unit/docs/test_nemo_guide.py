"""The page for those who come from NeMo says what the table says."""

from pathlib import Path

from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.names import NAMES
from tests.scripts import script

ROOT = Path(__file__).resolve().parents[3]


def test_it_is_current() -> None:
    page = script("write_nemo_guide")
    assert page.PAGE.read_text() == page.text(), "run python scripts/write_nemo_guide.py"


def test_every_argument_and_name_is_on_it() -> None:
    text = script("write_nemo_guide").PAGE.read_text()
    for name, call in CALLS.items():
        assert f"`{name}`" in text
        assert all(argument in text for argument in call.names)
    assert all(f"`{name}`" in text for name in NAMES)
