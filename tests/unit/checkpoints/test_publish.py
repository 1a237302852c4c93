"""What --overwrite may replace, and what it leaves as it is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.publish import Written, publish
from mixtral_recipes.errors import CheckpointError


def checkpoint(folder: Path, kind: str = "model") -> Path:
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "config.json").write_text("{}")
    write_manifest(folder, kind)  # pyright: ignore[reportArgumentType]
    return folder


def export(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("card")
    lineage.write(folder, Lineage("export", Identity("0" * 64)))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replace(final: Path, kind: Written, *sources: Path) -> None:
    with publish(final, kind, overwrite=True, sources=sources) as staging:
        (staging / "new").write_text("new")


@pytest.mark.parametrize(("make", "kind"), [(checkpoint, "model"), (export, "export")])
def test_one_of_ours_is_replaced(tmp_path: Path, make: Callable[[Path], Path], kind: Written) -> None:
    final = make(tmp_path / "final")
    replace(final, kind, tmp_path / "source", tmp_path)  # beside it, or above it
    assert content(final) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["final"]


def project(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "train.py").write_text("print('hours of work')")
    return folder


def _with(folder: Path, name: str, *, link: bool = False) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(folder.parent) if link else path.write_text("mine")
    return folder


def _changed(folder: Path) -> Path:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("config.json", "train.py"))
    return folder


def _with_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder


STANDING: dict[str, tuple[Written, Callable[[Path], Path], str]] = {
    "a project": ("model", project, "neither a mixtral-recipes checkpoint.* it has config.json, train.py"),
    "a project, for an export": (
        "export",
        project,
        "neither a mixtral-recipes checkpoint.* it has config.json, train.py",
    ),
    "an empty manifest": ("model", lambda f: _with(project(f), "manifest.json"), "not valid JSON"),
    "a manifest changed by hand": ("model", lambda f: _changed(checkpoint(f)), "its seal"),
    "an empty folder beside": ("model", lambda f: _with_folder(checkpoint(f), "notes"), "also has notes,"),
    "empty folders in an export": ("export", lambda f: _with_folder(export(f), "a/b/.cache"), "also has a/b/.cache,"),
    "a run's checkpoint": (
        "model",
        lambda f: checkpoint(f, "training"),
        "a run's checkpoint, not an imported",
    ),
    "an adapter": ("model", lambda f: checkpoint(f, "adapter"), "an adapter checkpoint, not an imported model"),
    "a checkpoint, for an export": ("export", checkpoint, "an imported model, not an export"),
    "an export, for a model": ("model", export, "neither a mixtral-recipes checkpoint"),
    "a file more": ("model", lambda f: _with(checkpoint(f), "notes.txt"), "also has notes.txt"),
    "a file more, deeper": ("model", lambda f: _with(checkpoint(f), "context/notes.txt"), "also has context/notes.txt"),
    "a hidden file more": ("export", lambda f: _with(export(f), ".env"), "also has .env"),
    "a link more": ("export", lambda f: _with(export(f), "data", link=True), "also has data"),
    "a file": ("model", lambda f: Path(f.write_text("mine") and f), "neither a mixtral-recipes checkpoint"),
}


@pytest.mark.parametrize("what", STANDING)
def test_nothing_else_is(tmp_path: Path, what: str) -> None:
    kind, make, why = STANDING[what]
    final = make(tmp_path / "final")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        replace(final, kind)
    assert content(tmp_path) == before


@pytest.mark.parametrize("inside", ["", "context"])
def test_a_source_is_not_replaced(tmp_path: Path, inside: str) -> None:
    final = checkpoint(tmp_path / "final")
    (tmp_path / "link").symlink_to(final)
    before = content(final)
    for source in (final / inside, tmp_path / "link" / inside):
        with pytest.raises(CheckpointError, match="is the input; choose another folder"):
            replace(final, "model", source)
    assert content(final) == before


@pytest.mark.parametrize("deeper", ["", "context"])
def test_nothing_is_put_into_a_source(tmp_path: Path, deeper: str) -> None:
    source = checkpoint(tmp_path / "source")
    before = content(source)
    with pytest.raises(CheckpointError, match=r"would be inside .*, which is the input; choose another place"):
        replace(source / deeper / "new", "export", source)
    assert content(source) == before


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target")
    (tmp_path / "final").symlink_to(target)
    before = content(target)
    with pytest.raises(CheckpointError, match=f"is a link to {target}"):
        replace(tmp_path / "final", "model")
    assert content(target) == before
    assert (tmp_path / "final").is_symlink()


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    final = tmp_path / "final"
    publishing = publish(checkpoint(final), "model", overwrite=True)
    (publishing.__enter__() / "new").write_text("new")
    (final / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="also has notes"):
        publishing.__exit__(None, None, None)
    assert (final / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["final"]
