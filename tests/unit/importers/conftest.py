"""Importer tests: synthetic models, and a home of their own."""

from pathlib import Path

import pytest

from tests.mixtral_folder import make_model  # noqa: F401  # a fixture
from tests.nemo_folder import nemo  # noqa: F401  # a fixture


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
