"""YAML as plain data and nothing else: no tags, no aliases, no merges, no repeated keys, bounded size and depth."""

from pathlib import Path
from typing import Any

import yaml

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.system.pointers import refuse_pointer

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def load_plain(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping.

    Args:
        path: The file.

    Raises:
        RecipeError: names the file, the line, and what is not plain data.
    """
    try:
        refuse_pointer(path, RecipeError)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes; a recipe is not.")
    try:
        loader = _PlainLoader(raw.decode())
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except _NotPlain as error:
        raise RecipeError(f"{path}:{error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: holds no mapping; begin with e.g. recipe: mixtral_8x7b.finetune")
    return data


class _NotPlain(Exception):
    """``line: what``."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without everything that a recipe does not need."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _NotPlain(f"{line}: alias *{event.anchor} is not read; write the value out.")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _CORE_TAGS:
            raise _NotPlain(f"{line}: tag {tag.replace('tag:yaml.org,2002:', '!!')} is not read.")
        if self._depth >= MAX_DEPTH:
            raise _NotPlain(f"{line}: nested deeper than {MAX_DEPTH} levels.")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise _NotPlain(f"{line}: {key.value!r} is not a setting's name.")
            if key.value in seen:
                raise _NotPlain(f"{line}: {key.value!r} is given twice.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# A date is text here.
_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
