"""A quantised base that is kept, without the model: what is written beside its weights, and when it is not believed."""

from pathlib import Path

import pytest

from mixtral_recipes.checkpoints import quantized_cache
from mixtral_recipes.checkpoints.quantized_cache import read_cached, write_cache


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    """Where more ranks hold a copy of a weight than it has parts; here the only one."""
    write_cache(tmp_path / "kept", [])
    assert read_cached(tmp_path / "kept", [])


def test_one_in_another_form_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path / "kept", [])
    monkeypatch.setattr(quantized_cache, "_FORM", quantized_cache._FORM + 1)
    assert not read_cached(tmp_path / "kept", [])
    assert not (tmp_path / "kept").exists()
    write_cache(tmp_path / "kept", [])
    assert read_cached(tmp_path / "kept", [])
