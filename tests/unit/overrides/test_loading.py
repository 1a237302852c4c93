"""A recipe of one's own, named by its function."""

import json
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import paths, yaml_file
from mixtral_recipes.overrides.inspection import recipe_of
from mixtral_recipes.overrides.loading import load, load_own

ROOT = Path(__file__).resolve().parents[3]
MORE = """
def pre(**arguments): return llm.mixtral_tiny.pretrain_recipe(**arguments)
def number(): return 3
def broken(): return {}["x"]
def with_object(): return narrow_with(NarrowLoRA())
def narrow_with(peft):
    recipe = narrow()
    recipe.peft = peft
    return recipe
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "own_lab.py").write_text(page.partition("```python\n")[2].partition("```")[0] + MORE)
    (tmp_path / "misspelt_lab.py").write_text("x = 1 +")
    (tmp_path / "incomplete_lab.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))


def test_classes_of_ones_own_are_changed_like_ours() -> None:
    recipe = load_own("own_lab.narrow", "finetune", name="mine", num_gpus_per_node=1)
    paths.apply(recipe, ["peft.dim=4", "trainer.callbacks[0].above=2"])
    peft: Any = fdl.build(recipe.peft)
    trainer: Any = fdl.build(recipe.trainer)
    assert (recipe.log.name, type(peft).__name__, peft.dim) == ("mine", "NarrowLoRA", 4)
    assert (trainer.devices, trainer.callbacks[0].above) == (1, 2)


def test_a_command_names_it_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["finetune", "--recipe", "own_lab.narrow", "--nproc-per-node", "1", "peft.dim=4", "--dry-run"]
    assert main.run(line) == 0
    shown = capsys.readouterr().out
    assert "_target_: own_lab.NarrowLoRA" in shown
    assert "torchrun --nproc-per-node 1" in shown


def test_it_is_shown_compared_and_planned(capsys: pytest.CaptureFixture[str]) -> None:
    shown = answer(capsys, "recipes", "show", "own_lab.narrow(num_gpus_per_node=1)", "peft.dim=4")
    assert shown["settings"]["peft.dim"] == 4
    assert shown["layout"]["num_gpus_per_node"] == 1
    found = answer(capsys, "recipes", "diff", "mixtral_tiny.finetune", "own_lab.narrow")["differences"]
    assert {"trainer.callbacks[0].above", "peft.dim"} <= {one["path"] for one in found}
    wide, narrow = (
        answer(capsys, "plan", "--recipe", name, "--num-gpus-per-node", "1", "--hardware", "h100")["memory_gb"]
        for name in ("mixtral_tiny", "own_lab.narrow")
    )
    assert 0 < narrow["adapters"] < wide["adapters"]
    assert answer(capsys, "plan", "--recipe", "own_lab.pre", "data.seq_length=128")["memory_gb"]["total"] > 0
    assert main.run(["plan", "--recipe", "own_lab.pre", "--task", "finetune"]) == 2
    assert "returns a recipe for pretrain, not for finetune" in capsys.readouterr().err


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main.run([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("mixtral_8x7b.finetune", {}, r"No module named 'mixtral_8x7b'; .* Did you mean the recipe 'mixtral_8x7b'\?"),
        ("mixtral_8x7.finetune", {}, r"No module named 'mixtral_8x7'; .* Did you mean the recipe 'mixtral_8x7b'\?"),
        ("own_lab.narow", {}, r"own_lab has no function 'narow'\. Did you mean 'narrow'\?"),
        ("own_lab.number", {}, "own_lab.number returned int, not a recipe"),
        ("own_lab.pre", {}, "own_lab.pre returns a recipe for pretrain, not for finetune"),
        ("own_lab.number", {"num_nodes": 2}, r"own_lab.number has no argument 'num_nodes'; add one, or \*\*"),
        ("own_lab.with_object", {}, r"peft holds an object, .* use run.Config\(CLASS"),
        ("own_lab.broken", {}, r"own_lab.broken: KeyError: 'x' \(.*own_lab.py:\d+\)"),
        ("misspelt_lab.x", {}, r"misspelt_lab.x: SyntaxError: .*misspelt_lab.py, line 1\)"),
        ("incomplete_lab.x", {}, r"No module named 'nowhere_at_all' \(.*incomplete_lab.py:1\)"),
        (".x", {}, "Empty module name"),
        ("own_lab.narrow(dim=1.5)", {}, r"use own_lab.narrow alone, and pass its arguments as options"),
    ],
)
def test_what_is_wrong_with_it_is_said(path: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_own(path, "finetune", **arguments)


def test_arguments_in_a_recipe_s_name_are_refused_where_only_the_name_counts() -> None:
    with pytest.raises(RecipeError, match=r"recipe mixtral_8x7b\(num_nodes=2\): use mixtral_8x7b alone"):
        load("mixtral_8x7b(num_nodes=2)", "finetune")


def test_text_without_quotes_is_named() -> None:
    with pytest.raises(RecipeError, match=r"peft_scheme=dora is not a plain value; put text in quotes: 'dora'"):
        recipe_of("mixtral_8x7b.finetune(peft_scheme=dora)")
    with pytest.raises(RecipeError, match=r"peft_scheme=\{\[\]: 1\} is not a plain value"):
        recipe_of("mixtral_8x7b.finetune(peft_scheme={[]: 1})")


@pytest.mark.parametrize("call", ["('dora')", "(peft_scheme=)", "(**{'peft_scheme': 'dora'})", "() + ()"])
def test_a_recipes_arguments_are_named(call: str) -> None:
    with pytest.raises(RecipeError, match="pass arguments by name"):
        recipe_of(f"mixtral_8x7b.finetune{call}")


def test_a_file_cannot_name_it_and_says_who_can(tmp_path: Path) -> None:
    recipe, file = load_own("own_lab.narrow", "finetune"), tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"Warn is not one of .* name it with --recipe MODULE\.FUNCTION"):
        yaml_file.write_recipe(recipe, file)
    for text in (
        "recipe: mixtral_tiny.finetune\npeft: {_target_: unsafe_lab.NarrowLoRA}",
        "recipe: unsafe_lab.narrow",
    ):
        (tmp_path / "unsafe_lab.py").write_text("raise SystemExit('imported on the word of a file')")
        file.write_text(text)
        with pytest.raises(RecipeError, match=r"(is not one of|unknown recipe)"):
            yaml_file.read_recipe(file)
