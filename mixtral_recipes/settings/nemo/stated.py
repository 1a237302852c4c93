"""Defaults and types of settings, from the text of their classes: `migrate` loads neither torch nor Megatron."""

import ast
import dataclasses
import functools
import sys
import typing
from pathlib import Path
from typing import Any

from mixtral_recipes.settings.classes import PUBLIC, THEIRS

_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, float, int, str, list, tuple)},
    **{name: getattr(typing, name) for name in ("Any", "List", "Literal", "Optional", "Union")},
}
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
    line = _field(owner, name)
    try:
        return ast.literal_eval(line.value) if line and line.value else dataclasses.MISSING
    except ValueError:
        return dataclasses.MISSING


def stated_type(owner: str, name: str) -> Any:
    """A setting's type, where it is made of Python's own; `typing.Any` where it is not, or the text does not say.

    Args:
        owner: A settings class.
        name: The setting.
    """
    line = _field(owner, name)
    # the text is an annotation of ours or of Megatron's, and of it only what names nothing but these types is evaluated
    names = {node.id for node in ast.walk(line.annotation) if isinstance(node, ast.Name)} if line else {""}
    return eval(ast.unparse(line.annotation), dict(_TYPES)) if line and names <= _TYPES.keys() else Any


def _field(owner: str, name: str) -> ast.AnnAssign | None:
    """Where a class, or one of its bases, states a setting."""
    bases, fields = _read(owner)
    return fields.get(name) or next(filter(None, (_field(base, name) for base in bases)), None)


@functools.cache
def _read(name: str) -> tuple[list[str], dict[str, ast.AnnAssign]]:
    """A class's bases and fields; empty for what is not a class, or not installed."""
    file = _file_of(name)
    tree = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            fields = {line.target.id: line for line in lines if isinstance(line.target, ast.Name)}
            return [base.id for base in node.bases if isinstance(base, ast.Name)], fields
    return [], {}


def _file_of(name: str) -> Path | None:
    module = PUBLIC.get(name)
    if module is not None:
        return _PACKAGE_FOLDER / f"{module.replace('.', '/')}.py"
    place = f"{(THEIRS | _BASES).get(name, '').replace('.', '/')}.py"
    return next((file for folder in sys.path if (file := Path(folder, place)).is_file()), None)
