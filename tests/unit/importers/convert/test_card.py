"""What an exported model says about where it came from."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.checkpoints.format.manifest import read_manifest, write_manifest
from mixtral_recipes.importers.convert.card import model_card, provenance
from tests.mixtral_folder import mixtral_config

HUB = {"id": "hf://org/name", "revision": "abc123", "layout": "v4"}
RECIPE = {
    "peft.class": "LoRA",
    "peft.dim": 16,
    "data.class": "SquadDataModule",
    "trainer.seed": 1,
    "data.tokenizer": None,
}


def checkpoint(folder: Path, kind: Any, source: dict[str, Any], **facts: Any) -> Path:
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "config.json").write_text("{}")
    if facts:
        (folder / "context" / "run.json").write_text(json.dumps(facts))
    write_manifest(folder, kind, source=source)
    return folder


def told(folder: Path) -> dict[str, Any]:
    return provenance(folder, read_manifest(folder))


def test_an_import_from_the_hub(tmp_path: Path) -> None:
    found = told(checkpoint(tmp_path / "import", "model", HUB))
    assert found.pop("created")
    assert found == {"kind": "model", **HUB}


def test_an_import_from_a_folder_does_not_name_it(tmp_path: Path) -> None:
    found = told(checkpoint(tmp_path / "import", "model", {"path": "/home/someone/model", "layout": "v5"}))
    assert "someone" not in json.dumps(found)
    assert found["layout"] == "v5"


def test_a_run_names_its_recipe_its_steps_and_the_model_it_began_as(tmp_path: Path) -> None:
    """Adapters on a fine-tuned model on an import from the Hub."""
    base = checkpoint(tmp_path / "import", "model", HUB)
    tuned = checkpoint(tmp_path / "tuned", "training", {"run": "a", "step": 5}, run="a", step=5, base=str(base))
    facts = {"run": "b", "step": 20, "consumed_samples": 640, "base": str(tuned), "recipe": RECIPE}
    found = told(checkpoint(tmp_path / "adapters", "adapter", {"run": "b", "step": 20}, **facts))
    assert found.pop("created")
    assert found == {
        "kind": "adapter",
        "run": "b",
        "step": 20,
        "consumed_samples": 640,
        "id": "hf://org/name",
        "revision": "abc123",
        "recipe": {"peft.class": "LoRA", "peft.dim": 16, "data.class": "SquadDataModule"},
    }
    assert told(tuned)["revision"] == "abc123"
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize("base", ["gone", "itself", None])
def test_a_base_that_cannot_be_followed(tmp_path: Path, base: str | None) -> None:
    where = {"gone": str(tmp_path / "gone"), "itself": str(tmp_path / "run"), None: None}[base]
    found = told(checkpoint(tmp_path / "run", "training", {"run": "a", "step": 5}, run="a", step=5, base=where))
    assert "id" not in found
    assert found["step"] == 5


def test_the_card() -> None:
    origin = {"id": "hf://org/name", "revision": "abc123", "step": 20, "run": "a|b", "recipe": {"peft.dim": 16}}
    card = model_card(origin, mixtral_config(), "v4", "BF16")
    assert "base_model: org/name" in card
    assert "# name (exported)" in card
    for row in ("| revision | abc123 |", "| step | 20 |", "| run | a\\|b |", "| recipe | `peft.dim=16` |"):
        assert row in card
    assert "2 layers and 8 experts (top 2)" in card
    assert "base_model" not in model_card({"kind": "model"}, mixtral_config(), "v4", "BF16")
