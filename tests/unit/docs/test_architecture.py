"""docs/architecture.md says what is there: its paths exist, its layers are those import-linter checks."""

import re
from pathlib import Path
from typing import Any

from tests.scripts import script

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "architecture.md"


def writer() -> Any:
    """scripts/write_architecture.py."""
    return script("write_architecture")


def test_every_path_exists() -> None:
    words = re.findall(r"`([^`\s]+)`", PAGE.read_text())
    ours = {word for word in words if word.split("/")[0] in {path.name for path in ROOT.iterdir()}}
    assert len(ours) > 50
    assert not [path for path in sorted(ours) if not (ROOT / path).exists()]


def test_every_folder_of_ours_is_named() -> None:
    packages = {
        path.parent for path in (ROOT / "mixtral_recipes").glob("*/__init__.py") if not path.parent.is_symlink()
    }
    packages |= {ROOT / name for name in ("cli", "executors", "importers")}
    folders = {f"{package.relative_to(ROOT)}/" for package in packages}
    named = set(re.findall(r"^\| `([^`]+)`", PAGE.read_text(), flags=re.MULTILINE))
    assert len(folders) > 15
    assert not folders - named


def test_the_layers_are_those_that_are_checked() -> None:
    blocks = {"layers": writer().layers()}
    assert writer().page(PAGE.read_text(), blocks) == PAGE.read_text(), "run python scripts/write_architecture.py"
