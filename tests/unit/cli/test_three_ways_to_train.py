"""mixtral_tiny trains for real from overrides, from a YAML file and from Python, to the same losses."""

import json
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.cli import main

STEPS = 3


def losses(run_dir: Path) -> list[Any]:
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == STEPS
    return [result["first_loss"], result["last_loss"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_overrides_yaml_and_python_train_to_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    changes = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=0", "trainer.log_every_n_steps=1"]
    changes += ["data.global_batch_size=4", "data.micro_batch_size=4"]
    line = ["pretrain", "--recipe", "mixtral_tiny", "--executor", "direct", "--dir", str(tmp_path)]
    assert main.run([*line, "--name", "overrides", *changes]) == 0

    file = tmp_path / "tiny.yaml"
    file.write_text(
        "recipe: mixtral_tiny.pretrain\nnum_gpus_per_node: 1\n"
        f"trainer: {{max_steps: {STEPS}, val_check_interval: 0, log_every_n_steps: 1}}\n"
        "data: {global_batch_size: 4, micro_batch_size: 4}\n"
    )
    assert main.run(["run", str(file), "--executor", "direct", "--dir", str(tmp_path), "--name", "yaml"]) == 0

    recipe = llm.mixtral_tiny.pretrain_recipe(dir=str(tmp_path), name="python", num_gpus_per_node=1)
    recipe.trainer.max_steps = STEPS
    recipe.trainer.val_check_interval = 0
    recipe.trainer.log_every_n_steps = 1
    recipe.data.global_batch_size = recipe.data.micro_batch_size = 4
    run.run(recipe, direct=True)

    by_overrides = losses(tmp_path / "overrides")
    assert by_overrides[1] < by_overrides[0]
    assert losses(tmp_path / "yaml") == by_overrides
    assert losses(tmp_path / "python") == by_overrides
