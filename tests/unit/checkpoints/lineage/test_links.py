"""An adapter's base is believed by content, wherever it lies."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.chain import Follower
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_config, hash_of_tokenizer, identity_of
from mixtral_recipes.checkpoints.lineage.links import base_of, source_parent
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.cli import serve
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.layout.topology import Topology


def model(folder: Path, *, weights: str = "w", tensors: bool = True, **config: Any) -> Path:
    """A checkpoint as import (tensors have hashes) or training (files have) writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "weights").mkdir(parents=True)
    (folder / "context").mkdir()
    (folder / "weights" / "__0_0.distcp").write_text(weights)
    (folder / "context" / "config.json").write_text(json.dumps({"rope_theta": 1e6} | config))
    (folder / "context" / "tokenizer.json").write_text("{}")
    digest = {"dtype": "BF16", "shape": [1], "sha256": hashlib.sha256(weights.encode()).hexdigest()}
    write_manifest(folder, "model", tensors={"lm_head.weight": digest} if tensors else None)
    return folder


def adapters_on(base: Path, folder: Path) -> Path:
    """An adapter checkpoint's lineage."""
    folder.mkdir()
    link = Parent("base", record.of_checkpoint(base), str(base))
    record.write(folder, Lineage("adapter", Identity(), parents=(link,)))
    return folder


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("other", [{"weights": "v"}, {"rope_theta": 5e5}], ids=["weights", "config"])
def test_another_model_at_the_bases_place_is_refused(tmp_path: Path, tensors: bool, other: dict[str, Any]) -> None:
    base = model(tmp_path / "base", tensors=tensors)
    before = identity_of(base)
    adapter = adapters_on(base, tmp_path / "adapter")
    assert base_of(adapter) == base
    model(base, tensors=tensors, **other)
    after = identity_of(base)
    name = "weights" if "weights" in other else "config"
    with pytest.raises(CheckpointError, match="is not the base of") as error:
        base_of(adapter)
    for identity in (before, after):
        assert getattr(identity, name)[:12] in str(error.value)


def test_what_does_not_decide_the_model_may_change(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tensors=False)
    adapter = adapters_on(base, tmp_path / "adapter")
    model(base, tensors=False, transformers_version="9", _name_or_path="/home/me", torch_dtype="bfloat16")
    (base / "context" / "notes.txt").write_text("imported again")
    write_manifest(base, "model", source={"path": "/other"})
    assert base_of(adapter) == base


def test_a_base_that_moved_is_named_and_compared(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    adapter = adapters_on(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"is not at .*base, or cannot be read; pass its new location with --base PATH"
    ):
        base_of(adapter)
    assert base_of(adapter, moved) == moved
    with pytest.raises(CheckpointError, match="is not the base of"):
        base_of(adapter, model(tmp_path / "other", weights="v"))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, where the tests have them."""
    root = os.getuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_a_base_in_a_home_folder_of_someone_else_is_not_there() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others
        home, shared = Path(name, "home"), Path(name, "shared")
        home.mkdir()
        shared.mkdir()
        adapter = adapters_on(model(home / "base"), shared / "adapter")
        Path(name).chmod(0o755)
        home.chmod(0)
        try:
            with as_nobody():
                with pytest.raises(
                    CheckpointError, match=r"is not at .*base, or cannot be read; pass its new location"
                ):
                    base_of(adapter)
                assert Follower(lambda *_: {}).follow(adapter)[1].state == "absent"
        finally:
            home.chmod(0o700)


@pytest.mark.parametrize(
    "load", [lambda path: InferenceModel.load(path, Topology()), lambda path: serve._is_large(str(path))]
)
def test_commands_without_base_say_which_has_it(tmp_path: Path, load: Callable[[Path], object]) -> None:
    base = model(tmp_path / "base")
    adapter = adapters_on(base, tmp_path / "adapter")
    write_manifest(adapter, "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"--base PATH of `mixtral-recipes export` \(the exported"):
        load(adapter)


def test_adapters_that_do_not_say_what_they_adapt(tmp_path: Path) -> None:
    record.write(tmp_path, Lineage("adapter", Identity()))
    with pytest.raises(CheckpointError, match="does not name the base model of the adapters"):
        base_of(tmp_path)


def test_an_export_brings_its_lineage_and_other_weights_in_it_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    (tmp_path / "tokenizer.json").write_text("{}")
    identity = Identity("a" * 64, hash_of_config(tmp_path), hash_of_tokenizer(tmp_path))
    export = Lineage("export", identity, files=("config.json", "tokenizer.json"))
    record.write(tmp_path, export)
    origin = {"path": str(tmp_path)}
    assert source_parent(tmp_path, origin, "a" * 64).record == export
    assert source_parent(tmp_path, origin, None).record == export  # cast on the way: nothing to compare
    with pytest.raises(CheckpointError, match=r"has weights bbbbbbbbbbbb, but weights aaaaaaaaaaaa was recorded"):
        source_parent(tmp_path, origin, "b" * 64)
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(CheckpointError, match="it has tokenizer"):
        source_parent(tmp_path, origin, "a" * 64)


@pytest.mark.parametrize("text", ["[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_configuration_that_is_none_has_no_identity(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not "):
        hash_of_config(tmp_path)
