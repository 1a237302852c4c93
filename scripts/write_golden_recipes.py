"""Writes tests/golden/recipes/*.yaml: resolved recipes as files, so that a changed default shows in a diff.

python scripts/write_golden_recipes.py
"""

from pathlib import Path

from mixtral_recipes.system import quiet

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "recipes"
RECIPES = {
    "mixtral_8x7b.pretrain": {},
    "mixtral_8x7b.pretrain.performance": {"performance_mode": True},
    "mixtral_8x7b.finetune": {},
    "mixtral_8x22b.pretrain": {},
    "mixtral_8x22b.finetune.full_packed_fp8": {"peft_scheme": "none", "packed_sequence": True, "precision": "fp8"},
    "mixtral_8x22b_64k.pretrain.b200_fp8": {"hardware": "b200", "precision": "fp8"},
}


def files() -> dict[Path, str]:
    """Every golden file and what it should say."""
    from mixtral_recipes.overrides.loading import load
    from mixtral_recipes.overrides.yaml_file import to_yaml

    found = {}
    for name, arguments in RECIPES.items():
        recipe, task, *_ = name.split(".")
        found[TARGET / f"{name}.yaml"] = to_yaml(load(recipe, task, **arguments), name=recipe)
    return found


if __name__ == "__main__":
    quiet.libraries()
    TARGET.mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
