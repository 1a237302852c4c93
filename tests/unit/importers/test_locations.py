"""hf://, nemo:// and paths."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers import locations
from mixtral_recipes.importers.locations import HubId, parse_source
from mixtral_recipes.importers.resolve import check_source, import_any, resolve
from mixtral_recipes.system.home import models_home


def test_hub_ids() -> None:
    assert parse_source("hf://mistralai/Mixtral-8x7B-v0.1") == HubId("mistralai/Mixtral-8x7B-v0.1")
    assert parse_source("mistralai/Mixtral-8x7B-v0.1@abc") == HubId("mistralai/Mixtral-8x7B-v0.1", "abc")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_source(str(tmp_path)) == tmp_path
    assert parse_source(f"hf://{tmp_path}") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name") == tmp_path / "org" / "name"
    for wrong in ("./missing", "name", "s3://bucket/key", "nemo://org/name", "a b/c", "-a/b", "a/b--c", "a/b.git"):
        with pytest.raises(CheckpointError):
            parse_source(wrong)


@pytest.mark.parametrize("text", ["hf://", "nemo://"])
@pytest.mark.parametrize("look", [parse_source, check_source, resolve, import_any, locations.checkpoint])
def test_a_name_that_is_not_given_is_not_this_folder(text: str, look: Callable[[str], object]) -> None:
    with pytest.raises(CheckpointError, match=f"^{text} names no model; is a shell variable not set"):
        look(text)


def test_finished_imports(tmp_path: Path) -> None:
    for name in ("org/model@aaa", "org/model@bbb", "org/other"):
        folder = models_home() / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    import os

    os.utime(models_home() / "org/model@aaa" / "manifest.json", (1, 1))
    assert resolve("nemo://org/model") == models_home() / "org/model@bbb"
    assert resolve("nemo://org/model@aaa") == models_home() / "org/model@aaa"
    assert locations.checkpoint("nemo://org/other") == models_home() / "org/other"
    with pytest.raises(CheckpointError, match="Did you mean 'org/other'"):
        resolve("nemo://org/othre")
    for name in ("org/*", "org/mode[l]", "org/model**"):  # no patterns
        with pytest.raises(CheckpointError, match="no finished import of that name"):
            resolve(f"nemo://{name}")
    with pytest.raises(CheckpointError, match="checkpoint folder or nemo://ID"):
        locations.checkpoint("hf://org/model")


def test_a_hugging_face_folder_is_imported_and_a_checkpoint_is_not(make_model) -> None:
    folder, _, _ = make_model()
    checkpoint = resolve(str(folder))
    assert (checkpoint / "weights").is_dir()
    assert resolve(str(checkpoint)) == checkpoint
    assert resolve(f"hf://{folder}") == checkpoint
