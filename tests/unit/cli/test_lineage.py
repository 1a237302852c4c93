"""``mixtral-recipes lineage`` on an export of an import."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from tests.mixtral_folder import make_model  # noqa: F401  # a fixture


@pytest.fixture
def chain(make_model: Any, tmp_path: Path) -> tuple[Path, Path, Path]:  # noqa: F811
    source, _, _ = make_model()
    model = import_checkpoint(str(source), tmp_path / "megatron", progress=False)
    return source, model, export_checkpoint(model, tmp_path / "back", layout="v5", progress=False)


def test_a_chain_that_matches(chain: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, model, export = chain
    assert main.run(["lineage", str(export), "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert told["matches"]
    assert told["weights_read"]
    assert [(link["link"], link["state"], link["where"]) for link in told["links"]] == [
        ("export", "ok", str(export)),
        ("model", "ok", str(model)),
        ("source", "ok", str(source)),
    ]
    assert len({link["identity"]["weights"] for link in told["links"]}) == 1  # converted bit for bit, v5 and back
    assert f"Reading {source}" in err


@pytest.mark.parametrize("link", [0, 1, 2])
def test_a_changed_weight_is_found_by_reading_only(
    chain: tuple[Path, Path, Path], link: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(chain[link].rglob("*.distcp"), chain[link] / "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main.run(["lineage", str(chain[2])]) == 2
    err = capsys.readouterr().err
    assert str(chain[link]) in err.splitlines()[-1]
    assert "this is a bug" not in err
    assert main.run(["lineage", str(chain[2]), "--quick"]) == 0


def test_what_is_small_is_compared_even_when_quick(
    chain: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = chain[0] / "config.json"
    config.write_text(config.read_text().replace("1000000.0", "500000.0"))
    assert main.run(["lineage", str(chain[2]), "--quick", "--json"]) == 2
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [link["state"] for link in told["links"]] == ["ok", "ok", "wrong"]
    assert "config" in told["links"][2]["detail"]


def test_a_folder_without_a_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main.run(["lineage", str(tmp_path)]) == 2
    assert "this is a bug" not in capsys.readouterr().err
