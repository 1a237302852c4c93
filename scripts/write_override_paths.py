"""Writes mixtral_recipes/overrides/completion.py: the dotted paths completion offers without importing torch.

    python scripts/write_override_paths.py

A test runs the same and compares.
"""

import textwrap
from pathlib import Path

import fiddle as fdl
import nemo_run as run

import mixtral_recipes as llm
from mixtral_recipes.overrides import paths as overrides
from mixtral_recipes.settings.nemo.arguments import rules_of
from mixtral_recipes.settings.nemo.calls import not_ours
from mixtral_recipes.settings.nemo.rules import Ignored, Only
from mixtral_recipes.system import quiet

TARGET = Path(__file__).resolve().parents[1] / "mixtral_recipes" / "overrides" / "completion.py"
HEAD = '''"""Every setting's dotted path, for shell completion. Written by scripts/write_override_paths.py."""

'''
TAIL = """
PATHS = [f"{part}.{name}" if part else name for part, names in _SETTINGS.items() for name in names.split()]
"""


def settings() -> dict[str, list[str]]:
    """Settings by the part they stand in, over both tasks, but those that no value changes anything of."""
    found: dict[str, list[str]] = {}
    recipe = llm.mixtral_8x7b.finetune_recipe(packed_sequence=True)
    recipe.log.wandb = run.Config(llm.WandbLogger)
    for part in (recipe, llm.mixtral_8x7b.pretrain_recipe()):
        _collect(part, "", found)
    return found


def _collect(config: fdl.Buildable, path: str, found: dict[str, list[str]]) -> None:
    target = fdl.get_callable(config)
    without_effect = {name for name, rule in rules_of(target).items() if isinstance(rule, Ignored | Only)}
    for name in overrides.fields(config):
        if name in {"timers", *not_ours(target), *without_effect}:
            continue
        names = found.setdefault(path, [])
        if name not in names:
            names.append(name)
        value = fdl.ordered_arguments(config).get(name)
        if isinstance(value, fdl.Buildable):
            _collect(value, f"{path}.{name}" if path else name, found)


def text() -> str:
    """The module's source."""
    return f"{HEAD}# part of a recipe -> its settings\n_SETTINGS = {_source(settings())}{TAIL}"


def _source(found: dict[str, list[str]]) -> str:
    body = []
    for part, names in found.items():
        lines = textwrap.wrap(" ".join(names), width=108, break_long_words=False)
        quoted = "\n".join(f'        "{line}{" " if line is not lines[-1] else ""}"' for line in lines)
        short = f'    "{part}": "{lines[0]}",\n'
        body.append(short if len(lines) == 1 and len(short) <= 120 else f'    "{part}": (\n{quoted}\n    ),\n')
    return "{\n" + "".join(body) + "}\n"


if __name__ == "__main__":
    quiet.libraries()
    TARGET.write_text(text())
