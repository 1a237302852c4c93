"""fiddle's JSON, in which NeMo keeps its settings (``context/io.json``), as plain values; and the way back.

fiddle's own reader imports every module that a file names, which runs whatever stands in it. Here a name stays a name:
a configured call becomes ``{"_target_": "module.Class", argument: value, ...}`` and a reference to a Python object
``{"_target_": "module.name", "_call_": False}``, as NeMo spells both in ``context/model.yaml``.

Source: fiddle `_src/experimental/serialization.py`, Serialization and Deserialization; NeMo `lightning/io/mixin.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.json_files import read_object

TARGET, CALL = "_target_", "_call_"
_BUILDABLE = "fiddle._src.config"
_METADATA = {"type": "pyref", "module": _BUILDABLE, "name": "BuildableTraverserMetadata"}
_CONFIG = {"type": "pyref", "module": _BUILDABLE, "name": "Config"}
_DEEPEST = 60  # a model's settings nest five deep
_MOST_NODES = 100_000  # and are some hundreds


def read(file: Path, *path: str) -> Any:
    """One part of a document as plain values; nothing else in it is looked at.

    Args:
        file: The JSON.
        path: Arguments that lead to it from the root: "model", "config".

    Raises:
        CheckpointError: it is not fiddle's JSON, or has no such part.
    """
    document = read_object(file, CheckpointError)
    try:
        reader = _Reader(document["objects"])
        node = document["root"]
        for name in path:
            node = reader.arguments(node)[name]
        return reader.plain(node)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file}: not in the form that NeMo writes ({type(error).__name__}: {error}).") from error


class _Reader:
    def __init__(self, objects: dict[str, Any]) -> None:
        self._objects = objects
        self._left = _MOST_NODES

    def arguments(self, node: Any) -> dict[str, Any]:
        """The arguments of a configured call, not yet read."""
        node = self._followed(node)
        return {_element(element): value for element, value in node["items"]}

    def plain(self, node: Any, depth: int = 0) -> Any:
        """A node and all below it."""
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        self._left -= 1
        if not self._left:  # references to references can double what is read with every line
            raise ValueError(f"more than {_MOST_NODES} values")
        if isinstance(node, list):
            return [self.plain(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        node = self._followed(node)
        kind = node["type"]
        if kind == "leaf":
            return node["value"]
        if kind == "pyref":
            return {TARGET: _name(node), CALL: False}
        values = [(_element(element), self.plain(value, depth + 1)) for element, value in node["items"]]
        name = _name(kind)
        if name in ("builtins.list", "builtins.tuple", "builtins.set"):
            return [value for _, value in values]
        if name == "builtins.dict":
            return dict(values)
        target = self._target(node, name)
        return {TARGET: target, **dict(values)} if target else {TARGET: name, CALL: False}

    def _target(self, node: Any, name: str) -> str | None:
        """What is called; None where the arguments are in a pickle beside the file, which is not opened here."""
        metadata = self._followed(node.get("metadata"))
        if metadata is None:
            return None
        entries = {_element(element): value for element, value in metadata["items"]}
        return _name(self._followed(entries["fn_or_cls"])) if "fn_or_cls" in entries else name

    def _followed(self, node: Any) -> Any:
        for _ in range(_DEEPEST):
            if not isinstance(node, dict) or node.get("type") != "ref":
                return node
            node = self._objects[node["key"]]
        raise ValueError("circular references")


def _name(pyref: dict[str, Any]) -> str:
    return f"{pyref['module']}.{pyref['name']}"


def _element(text: str) -> str:
    """``num_layers`` of ``Attr(name='num_layers')``; the same of a dictionary's ``Key(key='..')``."""
    found = re.fullmatch(r"\w+\(\w+=(?:'(.*)'|(\d+))\)", text)
    if found is None:
        raise ValueError(f"{text!r} does not name an argument")
    return found[1] if found[1] is not None else found[2]


def dump(value: dict[str, Any]) -> str:
    """A configured call, in the plain form `read` gives, as fiddle's JSON."""
    writer = _Writer()
    root = writer.node(value, "<root>")
    document = {"root": root, "objects": writer.objects, "refcounts": dict.fromkeys(writer.objects, 1)}
    return json.dumps(document | {"version": "0.0.1"})


class _Writer:
    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def node(self, value: Any, path: str) -> Any:
        """A value; objects are kept apart, and found by the paths they stand at."""
        if not isinstance(value, dict | list):
            return {"type": "leaf", "value": value, "paths": [path]}
        if isinstance(value, list):
            items = [[f"Index(index={n})", self.node(item, f"{path}[{n}]")] for n, item in enumerate(value)]
            return self._kept("list", {"type": _pyref("builtins.list"), "items": items, "metadata": None}, path)
        if value.get(CALL) is False:
            return _pyref(value[TARGET]) | {"paths": [path]}
        if TARGET not in value:
            items = [[f"Key(key={key!r})", self.node(item, f"{path}[{key!r}]")] for key, item in value.items()]
            keys = _sequence("builtins.tuple", list(value))
            return self._kept("dict", {"type": _pyref("builtins.dict"), "items": items, "metadata": keys}, path)
        names = [name for name in value if name != TARGET]
        items = [[f"Attr(name={name!r})", self.node(value[name], f"{path}.{name}")] for name in names]
        described = {
            "fn_or_cls": _pyref(value[TARGET]),
            "argument_names": _sequence("builtins.tuple", names),
            "argument_tags": _empty_dict(),
            "argument_history": _empty_dict(),
        }
        metadata = {
            "type": _METADATA,
            "items": [[f"Attr(name={name!r})", entry] for name, entry in described.items()],
            "metadata": _METADATA,
        }
        return self._kept(value[TARGET], {"type": _CONFIG, "items": items, "metadata": metadata}, path)

    def _kept(self, name: str, entry: dict[str, Any], path: str) -> dict[str, str]:
        key = f"{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name.rpartition('.')[2]).lower()}_{len(self.objects) + 1}"
        self.objects[key] = entry | {"paths": [path]}
        return {"type": "ref", "key": key}


def _pyref(name: str) -> dict[str, str]:
    module, _, symbol = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": symbol}


def _sequence(kind: str, values: list[str]) -> dict[str, Any]:
    items = [[f"Index(index={number})", value] for number, value in enumerate(values)]
    return {"type": _pyref(kind), "items": items, "metadata": None}


def _empty_dict() -> dict[str, Any]:
    return {"type": _pyref("builtins.dict"), "items": [], "metadata": _sequence("builtins.tuple", [])}
