"""Defaults of settings, read from the text of their classes: `migrate` loads neither torch nor Megatron."""

import ast
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from mixtral_recipes.settings.classes import PUBLIC, THEIRS

_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
_BASES = {  # Megatron's, of MixtralConfig
    "TransformerConfig": "megatron.core.transformer.transformer_config",
    "ModelParallelConfig": "megatron.core.model_parallel_config",
}


def stated_default(owner: str, name: str) -> Any:
    """What a setting is where it is not given; `dataclasses.MISSING` where the text of its class does not say.

    Args:
        owner: A settings class.
        name: The setting.
    """
    bases, values = _read(owner)
    found = values.get(name, dataclasses.MISSING)
    for base in bases:
        if found is dataclasses.MISSING:
            found = stated_default(base, name)
    return found


@functools.cache
def _read(name: str) -> tuple[list[str], dict[str, Any]]:
    """A class's bases, and its fields' defaults that are literals; nothing of what is no class, or not installed."""
    file = _file_of(name)
    tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [base.id for base in node.bases if isinstance(base, ast.Name)], dict(_fields(node))
    return [], {}


def _fields(node: ast.ClassDef) -> list[tuple[str, Any]]:
    found = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            try:
                found.append((line.target.id, ast.literal_eval(line.value)))
            except ValueError:
                continue
    return found


def _file_of(name: str) -> Path | None:
    module = PUBLIC.get(name)
    if module is not None:
        return _PACKAGE_FOLDER / f"{module.replace('.', '/')}.py"
    place = f"{(THEIRS | _BASES).get(name, '').replace('.', '/')}.py"
    return next((file for folder in sys.path if (file := Path(folder, place)).is_file()), None)
