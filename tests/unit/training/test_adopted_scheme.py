"""Adapters are trained on with the scheme they have."""

import json
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.settings.peft import DoRA, LoRA, recorded
from mixtral_recipes.settings.resume import RestoreConfig
from mixtral_recipes.training.origin import _adopted, check_adopted

THEIRS = LoRA(dim=6, alpha=9, target_modules=["linear_qkv"], rank_pattern={"linear_qkv": 2})


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "run.json").write_text(json.dumps({"peft": recorded(THEIRS)}))
    return tmp_path


def test_what_a_run_leaves_at_its_default_is_the_adapters(adapters: Path) -> None:
    assert _adopted(adapters, LoRA()) == THEIRS
    assert _adopted(adapters, LoRA(dim=6, dropout=0.1)).dropout == 0.1


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (None, "this run trains all weights"),
        (DoRA(), "was trained with peft.class=LoRA, but this run has peft.class=DoRA; pass --peft lora"),
        (LoRA(dim=8), "was trained with peft.dim=6, but this run has peft.dim=8"),
        (LoRA(target_modules="attention"), r"was trained with peft.target_modules=\['linear_qkv'\]"),
    ],
)
def test_another_scheme_is_refused(adapters: Path, peft: LoRA | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _adopted(adapters, peft)


def test_and_before_the_job_starts(adapters: Path) -> None:
    first = RestoreConfig(str(adapters))
    check_adopted(first, LoRA(dim=8))  # no checkpoint yet: the job looks itself
    write_manifest(adapters, kind="adapter")
    for start in (first, RestoreConfig("hf://org/base", adapter_path=str(adapters))):
        check_adopted(start, LoRA())
        with pytest.raises(RecipeError, match=r"was trained with peft\.dim=6, but this run has peft\.dim=8"):
            check_adopted(start, LoRA(dim=8))
    write_manifest(adapters, kind="training")
    check_adopted(first, LoRA(dim=8))
    with pytest.raises(RecipeError, match="has no adapters"):
        check_adopted(start, LoRA())
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        check_adopted(RestoreConfig("hf://org/base", adapter_path="/nowhere"), LoRA())
