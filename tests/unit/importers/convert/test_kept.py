"""A kept import is given for a source whose content is what was imported, and for no other."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.importers.convert import kept
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.system import remembered as memory


@pytest.fixture(params=[-1.0, 3600.0], ids=["old files", "young files"])
def _age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SETTLED_AFTER_S", request.param)


def imported(folder: Path, **options: Any) -> Path:
    return import_checkpoint(str(folder), progress=False, **options)


def weights_of(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint)["tensors"]


def keep_times(folder: Path, change: Callable[[], object]) -> None:
    """Change files, and set their times back as ``rsync -t`` of an older folder would."""
    before = {path: path.stat() for path in folder.iterdir()}
    change()
    for path, stat in before.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size


@pytest.mark.usefixtures("_age")
def test_other_weights_of_the_same_name_size_and_time(make_model: Any) -> None:
    folder, _, _ = make_model()
    first = imported(folder)
    keep_times(folder, lambda: make_model(seed=1))
    second = imported(folder)
    assert second != first
    assert weights_of(second) != weights_of(first)
    make_model()
    assert imported(folder) == first  # both are kept, and each is found again
    make_model(seed=1)
    assert imported(folder) == second


@pytest.mark.usefixtures("_age")
def test_one_byte(make_model: Any) -> None:
    folder, _, _ = make_model()
    first = imported(folder)
    file = folder / "model.safetensors"

    def change() -> None:
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)

    keep_times(folder, change)
    second = imported(folder)
    assert weights_of(second) != weights_of(first)


def test_the_same_weights_elsewhere_and_with_other_times(make_model: Any, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    first = imported(folder)
    copy = shutil.copytree(folder, tmp_path / "copies" / folder.name, copy_function=shutil.copyfile)
    assert imported(copy) == first
    (folder / "model.safetensors").touch()
    assert imported(folder) == first


def test_a_cast_import_is_compared_after_the_cast(make_model: Any) -> None:
    folder, _, _ = make_model()
    cast = imported(folder, dtype="fp32")
    assert imported(folder, dtype="fp32") == cast
    keep_times(folder, lambda: make_model(seed=1))
    assert imported(folder, dtype="fp32") != cast


def test_what_was_imported_is_not_read_again(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SETTLED_AFTER_S", -1.0)
    monkeypatch.setattr(kept, "holds", lambda *args: pytest.fail("the weights were read again"))
    folder, _, _ = make_model()
    assert imported(folder) == imported(folder)


@pytest.mark.usefixtures("_age")
def test_an_import_is_found_in_a_home_folder_that_may_only_be_read(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    folder, _, _ = make_model()
    first = imported(folder)
    monkeypatch.setattr("fcntl.flock", refuse)
    assert imported(folder) == first
    with pytest.raises(
        EnvironmentProblem, match=r"\(Read-only file system\); set MIXTRAL_RECIPES_HOME to a folder that you"
    ):
        imported(folder, dtype="fp16")


def test_a_kept_import_that_lost_a_file_is_made_again(make_model: Any, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    first = imported(folder)
    next(first.glob("weights/*.distcp")).unlink()
    assert imported(folder) == first
    export_checkpoint(first, tmp_path / "back", progress=False)
    (first / "context" / "tokenizer.json").write_text("longer than it was")
    assert imported(folder) == first
    export_checkpoint(first, tmp_path / "again", progress=False)


def test_a_revision_is_compared_whole(make_model: Any) -> None:
    folder, _, _ = make_model()
    checkpoint = imported(folder)
    origin = read_manifest(checkpoint)["source"]
    assert "id" not in origin
    source = object()
    found = {"id": "hf://org/name", "revision": "a" * 12 + "b" * 28}
    assert not kept.is_of(checkpoint, source, found)  # pyright: ignore[reportArgumentType]
