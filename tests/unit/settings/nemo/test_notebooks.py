"""Notebooks: `migrate` reads their cells as one script, and writes them back."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.migrate import MARK, migrate, scripts_in

SHELL = "%%bash\nhead -n 3 data.jsonl > few.jsonl"
CELLS: list[tuple[str, Any]] = [
    ("markdown", ["# Fine-tuning\n", "from nemo.collections import llm"]),
    ("code", ["%%time\n", "from nemo.collections import llm\n", "from nemo import lightning as nl"]),
    ("code", "\n!pip install \\\n  nemo_run"),
    ("code", []),
    ("code", ["if True:\n", "    !nvidia-smi\n", "    recipe = llm.mixtral_8x7b.finetune_recipe()\n", "llm.deploy()"]),
    ("code", [SHELL]),
    ("code", ["recipe.trainer.strategy = nl.MegatronStrategy(progress_interval=5)\n"]),
]


def notebook(cells: list[tuple[str, Any]]) -> str:
    made = [{"cell_type": kind, "id": f"c{number}", "source": source} for number, (kind, source) in enumerate(cells)]
    return json.dumps({"cells": made, "metadata": {"name": "混合"}, "nbformat": 4}, indent=1, ensure_ascii=False) + "\n"


def test_a_notebook_is_read_as_one_script_and_written_back(tmp_path: Path) -> None:
    (tmp_path / "peft.ipynb").write_text(notebook(CELLS))
    found = migrate(tmp_path / "peft.ipynb")
    assert [(each.place, each.kind) for each in found.findings] == [
        ("cell 2:2", "changed"),
        ("cell 2:3", "changed"),
        ("cell 5:4", "refused"),
        ("cell 6:1", "note"),
        ("cell 7:1", "warned"),
    ]
    changed = dict(enumerate(json.loads(found.source)["cells"], 1))
    assert changed[2]["source"] == [
        "%%time\n",
        "import mixtral_recipes as llm\n",
        "from mixtral_recipes import lightning as nl",
    ]
    assert changed[5]["source"][:3] == CELLS[4][1][:3]
    assert changed[5]["source"][3].startswith(f"{MARK} deploy is not available in mixtral-recipes: ")
    assert changed[5]["source"][4:] == ["llm.deploy()"]
    for number in (1, 3, 4, 7):
        assert changed[number]["source"] == CELLS[number - 1][1]


def test_a_notebook_without_anything_of_nemos_stays_as_it_is(tmp_path: Path) -> None:
    text = notebook([("code", ["x = 1\n", "\n", "%matplotlib inline"]), ("markdown", "nothing")])
    (tmp_path / "other.ipynb").write_text(text)
    assert migrate(tmp_path / "other.ipynb").source == text


@pytest.mark.parametrize("text", ["import nemo", "[]", '{"cells": [{"cell_type": "code"}]}'])
def test_a_file_that_is_no_notebook_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "broken.ipynb").write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.ipynb: not a Jupyter notebook\.$"):
        migrate(tmp_path / "broken.ipynb")


def test_a_folder_s_notebooks_are_read_and_not_their_checkpoints(tmp_path: Path) -> None:
    for name in ("a.py", "b.ipynb", ".ipynb_checkpoints/b-checkpoint.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert scripts_in(tmp_path) == [tmp_path / "a.py", tmp_path / "b.ipynb"]
