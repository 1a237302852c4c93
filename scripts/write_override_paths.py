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
from mixtral_recipes.settings.nemo.calls import not_ours
from mixtral_recipes.system import quiet

TARGET = Path(__file__).resolve().parents[1] / "mixtral_recipes" / "overrides" / "completion.py"
HEAD = '''"""Every setting's dotted path, for shell completion. Written by scripts/write_override_paths.py."""

# part of a recipe -> its settings
SETTINGS = {
'''
TAIL = """}

PATHS = [f"{part}.{name}" if part else name for part, names in SETTINGS.items() for name in names.split()]
"""


def settings() -> dict[str, list[str]]:
    """Settings by the part they stand in, over pretraining and fine-tuning recipes."""
    found: dict[str, list[str]] = {}
    recipe = llm.mixtral_8x7b.finetune_recipe(packed_sequence=True)
    recipe.log.wandb = run.Config(llm.WandbLogger)
    for part in (recipe, llm.mixtral_8x7b.pretrain_recipe()):
        _collect(part, "", found)
    return found


def _collect(config: fdl.Buildable, path: str, found: dict[str, list[str]]) -> None:
    left_out = {"timers", *not_ours(fdl.get_callable(config))}
    names = [name for name in overrides.fields(config) if name not in left_out]
    found[path] = list(dict.fromkeys([*found.get(path, []), *names]))
    for name in names:
        value = fdl.ordered_arguments(config).get(name)
        if isinstance(value, fdl.Buildable):
            _collect(value, f"{path}.{name}" if path else name, found)


def text() -> str:
    """The module's source."""
    body = []
    for part, names in settings().items():
        lines = textwrap.wrap(" ".join(names), width=108, break_long_words=False)
        quoted = "\n".join(f'        "{line}{" " if line is not lines[-1] else ""}"' for line in lines)
        body.append(f'    "{part}": (\n{quoted}\n    ),\n' if len(lines) > 1 else f'    "{part}": "{lines[0]}",\n')
    return HEAD + "".join(body) + TAIL


if __name__ == "__main__":
    quiet.libraries()
    TARGET.write_text(text())
