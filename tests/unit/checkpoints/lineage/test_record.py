"""lineage.json: what is written is read back, and what was changed is not believed."""

import dataclasses
import json
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.errors import CheckpointError

SOURCE = Lineage("source", Identity("a" * 64), origin={"id": "hf://org/name", "revision": "abc"})
MODEL = Lineage("model", Identity("b" * 64, "c" * 64, "d" * 64), parents=(Parent("source", SOURCE, "/somewhere"),))
RUN = Lineage(
    "adapter",
    Identity("e" * 64),
    run={"name": "r", "step": 3},
    recipe={"peft.dim": 4, "trainer.callbacks": None},
    data={"form": "SQuAD", "sha256": "f" * 64},
    parents=(Parent("base", MODEL, "/elsewhere"),),
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    record.write(tmp_path, RUN)
    assert record.read(tmp_path) == RUN
    assert [link.kind for link in RUN.ancestors()] == ["adapter", "model", "source"]


def test_folders_can_be_left_out_and_do_not_count(tmp_path: Path) -> None:
    record.write(tmp_path, RUN, paths=False)
    assert "/elsewhere" not in (tmp_path / record.NAME).read_text()
    assert record.read(tmp_path).digest == RUN.digest == RUN.at("base", Path("/moved")).digest


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Lineage) if field.name != "parents"])
def test_every_field_is_sealed_and_what_tells_the_history_is_in_its_digest(tmp_path: Path, name: str) -> None:
    values = {"identity": Identity("0" * 64), "kind": "training", "created": "then", "code": "9", "files": ("x",)}
    changed = values.get(name, {"x": 1})
    other = dataclasses.replace(RUN, **{name: changed})
    assert (other.digest == RUN.digest) == (name in ("created", "code", "tensors", "files"))
    record.write(tmp_path, RUN)
    seal = json.loads((tmp_path / record.NAME).read_text())["seal"]
    record.write(tmp_path, other)
    path = tmp_path / record.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": seal}))
    with pytest.raises(CheckpointError, match="was changed by hand"):
        record.read(tmp_path)


def test_a_grandparent_counts(tmp_path: Path) -> None:
    record.write(tmp_path, RUN)
    path = tmp_path / record.NAME
    plain = json.loads(path.read_text())
    plain["parents"][0]["record"]["parents"][0]["record"]["origin"]["revision"] = "other"
    path.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="was changed by hand"):
        record.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"format": 3}',
        '{"format": "mixtral-recipes/lineage/1"}',
        '{"format": "mixtral-recipes/lineage/1", "kind": [], "identity": 1, "parents": {}, "created": 0, "code": 0}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / record.NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"lineage\.json: ") as error:
        record.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_record_deeper_than_any_chain_is_refused(tmp_path: Path) -> None:
    deep = SOURCE
    for _ in range(102):
        deep = Lineage("model", Identity("a" * 64), parents=(Parent("source", deep),))
    record.write(tmp_path, deep)
    with pytest.raises(CheckpointError, match="records deep"):
        record.read(tmp_path)


def test_a_folder_without_one_says_so(tmp_path: Path) -> None:
    assert record.read_or_none(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"has no lineage\.json"):
        record.read(tmp_path)
