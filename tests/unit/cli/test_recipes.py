"""``recipes show`` begins with what one asks first: the model's sizes, the layout, and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.recipes import catalog

pytestmark = pytest.mark.filterwarnings("ignore")


def shown(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main.run(["recipes", "show", *line.split()]) == 0
    return capsys.readouterr().out


def facts(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(shown(f"{line} --json", capsys).splitlines()[-1])


def test_the_head_says_layers_heads_experts_parameters_layout_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    layout = catalog.entry("mixtral_8x7b").layout("pretrain")
    model, where, why = shown("mixtral_8x7b.pretrain", capsys).splitlines()[:3]
    for words in ("32 layers", "32 heads", "8 groups", "8 experts", "46.70 B parameters"):
        assert words in model
    assert where.split(maxsplit=1) == ["layout", f"8 x 8 processes: {layout.topology.describe()}"]
    assert why.split(maxsplit=1) == ["why", layout.why]


@pytest.mark.parametrize(
    ("spec", "task"),
    [
        ("mixtral_8x22b.finetune", "peft"),
        ("mixtral_8x7b.finetune(peft_scheme='none',packed_sequence=True)", "full_packed"),
    ],
)
def test_why_is_the_tasks_own(spec: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(spec, capsys)
    assert found["why"] == catalog.entry(spec.partition(".")[0]).layout(task).why
    assert found["layout"]["topology"] == catalog.entry(spec.partition(".")[0]).layout(task).topology.describe()


def test_json_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts("mixtral_8x22b.pretrain", capsys)
    assert found["model"] == {
        "num_layers": 56,
        "hidden_size": 6144,
        "num_attention_heads": 48,
        "num_query_groups": 8,
        "num_moe_experts": 8,
        "parameters": 140_620_634_112,
    }
    assert (found["layout"]["num_nodes"], found["layout"]["expert_model_parallel_size"]) == (16, 8)
    assert found["settings"]["trainer.num_nodes"] == 16


def test_a_changed_layout_has_no_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts("mixtral_8x7b.pretrain trainer.num_nodes=4", capsys)["why"] is None
    assert "not one of our default layouts" in shown("mixtral_8x7b.pretrain trainer.num_nodes=4", capsys)


def test_of_a_file_the_recipe_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: mixtral_tiny.finetune\ntrainer: {max_steps: 3}\n")
    assert facts(str(file), capsys)["why"] == catalog.entry("mixtral_tiny").layout("peft").why


def test_a_default_that_is_made_anew_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["recipes", "diff", "mixtral_tiny", "trainer.callbacks=[]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["differences"]
    assert {"path": "trainer.callbacks[0].timer_kwargs", "a": {}, "b": "-"} in found
