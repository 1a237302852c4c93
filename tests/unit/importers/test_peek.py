"""What can be seen of a model without fetching or importing it."""

from pathlib import Path

import pytest

from mixtral_recipes.embedded import resolve
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.peek import peek
from mixtral_recipes.system.home import models_home


def test_every_way_of_naming_a_model_that_is_here(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "mg")
    kept = import_checkpoint(str(folder), models_home() / "org" / "name@0123456789ab")
    assert peek("embedded://mixtral_tiny") == resolve("embedded://mixtral_tiny")
    assert peek(str(folder)) == peek(f"hf://{folder}") == folder
    assert peek(str(checkpoint)) == checkpoint / "context"
    assert peek("nemo://org/name") == peek("hf://org/name") == kept / "context"
    assert peek("hf://org/name@0123456789abcdef") == kept / "context"


def test_what_the_hubs_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "snapshots" / "1" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(config))
    assert peek("hf://org/other") == config.parent


@pytest.mark.parametrize(
    "source",
    ["hf://org/none", "hf://org/none@a**b", "nemo://org/none", "/no/such/folder", "one-word", "s3://bucket/x"],
)
def test_what_is_not_here(source: str) -> None:
    assert peek(source) is None


def test_a_folder_of_another_form(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert peek(str(tmp_path)) is None
