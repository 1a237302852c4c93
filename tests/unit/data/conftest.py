"""Shared by the data tests: a cache of their own, and the embedded tokenizer."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's tokenizer."""
    from mixtral_recipes.data.tokenizers import load_tokenizer

    return load_tokenizer("embedded://mixtral_tiny")
