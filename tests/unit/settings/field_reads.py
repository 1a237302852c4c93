"""Which settings the code reads, found in its text.

An access counts when its receiver is called what the code calls an object of that class (``strategy.x``,
``trainer.strategy.x``), or is ``self`` in the class or in one of its family. ``getattr(receiver, name)`` with a
computed name counts for every name spelled out in the same function, and for the fields of a class it loops over.
"""

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# Class -> what code calls an object of it, besides ``self``.
RECEIVERS = {
    "MixtralModel": ("model",),
    "MixtralConfig": ("config",),
    "Trainer": ("trainer",),
    "MegatronStrategy": ("strategy",),
    "MegatronMixedPrecision": ("precision", "plugins"),
    "MegatronOptimizerModule": ("optim",),
    "LRSchedule": ("schedule",),
    "DataModule": ("data", "module"),
    "PackedSequenceSpecs": ("specs", "packed_sequence_specs"),
    "LoRA": ("peft", "scheme"),
    "AutoTokenizer": ("settings",),
    "NullTokenizer": ("tokenizer",),
    "AutoResume": ("resume",),
    "RestoreConfig": ("restore_config", "restore"),
    "ModelCheckpoint": ("policy",),
    "NeMoLogger": ("log",),
    "TensorBoardLogger": ("tensorboard",),
    "WandbLogger": ("wandb", "settings"),
    "MLFlowLogger": ("mlflow", "settings"),
    "PreemptionCallback": ("hook",),
}

Reads = dict[str, set[str]]


def sources() -> list[Path]:
    """Every module of the package, apart from the generated list of paths."""
    found = []
    for folder in ("mixtral_recipes", "cli", "executors", "importers"):
        found += sorted((ROOT / folder).rglob("*.py"))
    return [path for path in found if path.name != "completion.py"]


def reads(texts: Iterable[str]) -> Reads:
    """Receiver (the last part of it, or ``self of CLASS``) -> names read from it."""
    found: Reads = defaultdict(set)
    for text in texts:
        for scope, node in _scoped(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[_receiver(node.value, scope)].add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                for receiver in _computed(node, scope):
                    found[receiver] |= _spelled(node)
            elif isinstance(node, ast.Call) and _named(node, "getattr") and isinstance(node.args[1], ast.Constant):
                found[_receiver(node.args[0], scope)].add(str(node.args[1].value))
    return found


def _scoped(node: ast.AST, scope: str = "") -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.ClassDef) else scope
        yield inner, child
        yield from _scoped(child, inner)


def _receiver(node: ast.expr, scope: str) -> str:
    if isinstance(node, ast.Name):
        return f"self of {scope}" if node.id == "self" else node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _named(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


def _computed(function: ast.FunctionDef, scope: str) -> list[str]:
    """What a function reads by names it computes."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _named(node, "getattr")]
    return [_receiver(call.args[0], scope) for call in calls if not isinstance(call.args[1], ast.Constant)]


def _spelled(function: ast.FunctionDef) -> set[str]:
    """Names spelled out in a function, and the fields of our classes it loops over."""
    names = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _named(node, "fields") and isinstance(node.args[0], ast.Name):
            import mixtral_recipes as llm

            looped = getattr(llm, node.args[0].id, None)
            names |= {field.name for field in dataclasses.fields(looped)} if looped is not None else set()
    return names


def unread(cls: type, found: Reads, fields: Iterable[str], rules: Iterable[str]) -> list[str]:
    """Fields of a class that nothing reads and no rule speaks of."""
    family = {base.__name__ for base in cls.__mro__} | {child.__name__ for child in _children(cls)}
    named = {name for base in cls.__mro__ for name in RECEIVERS.get(base.__name__, ())}
    read: set[str] = set()
    for receiver in (*named, *(f"self of {name}" for name in family)):
        read |= found.get(receiver, set())
    return [field for field in fields if field not in read and field not in set(rules)]


def _children(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _children(child)


def own_fields(cls: Any) -> list[str]:
    """A class's fields without those Megatron reads: its TransformerConfig's."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    theirs = {f.name for f in dataclasses.fields(TransformerConfig)} if issubclass(cls, TransformerConfig) else set()
    return [field.name for field in dataclasses.fields(cls) if field.name not in theirs]
