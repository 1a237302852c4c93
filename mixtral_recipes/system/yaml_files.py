"""YAML as plain data and nothing else: no tags, no merges, no repeated keys, bounded size, depth and numbers."""

from pathlib import Path
from typing import Any

import yaml

from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.system.json_files import LONGEST_NUMBER
from mixtral_recipes.system.pointers import refuse_pointer

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
_MOST_ALIASES = 100
_CORE = "tag:yaml.org,2002:"
_CORE_TAGS = {f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def load_plain(path: Path, error: type[MixtralRecipesError], *, aliases: bool = False) -> dict[str, Any]:
    """Read a file that holds one mapping.

    Args:
        path: The file.
        error: What to raise.
        aliases: Whether a value may stand for another (``*name``), as libraries write it where two are one object.

    Raises:
        MixtralRecipesError: names the file, the line, and what is not plain data.
    """
    try:
        refuse_pointer(path, error)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise error(f"{path} is too large; the limit is {MAX_BYTES:,} bytes.")
    try:
        loader = _PlainLoader(raw.decode())
        loader.aliases_left = _MOST_ALIASES if aliases else 0
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except _NotPlain as problem:
        raise error(f"{path}:{problem}") from None
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise error(f"{path}:{line}: {problem.problem or problem.context}.") from None
    except (yaml.YAMLError, ValueError) as problem:
        raise error(f"{path}: not valid YAML ({' '.join(str(problem).split())}).") from None
    if not isinstance(data, dict):
        raise error(f"{path}: not a YAML mapping; a settings file begins with a name and a colon.")
    return data


class _NotPlain(Exception):
    """``line: what``."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without everything that settings do not need."""

    aliases_left = 0
    _depth = 0
    _inside_anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            # One inside a value that has a name itself can double what is read with every line.
            if not self.aliases_left or self._inside_anchors:
                raise _NotPlain(f"{line}: alias *{event.anchor} is not supported; write out the value.")
            self.aliases_left -= 1
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _CORE_TAGS:
            raise _NotPlain(f"{line}: tag {tag.replace(_CORE, '!!')} is not supported.")
        if self._depth >= MAX_DEPTH:
            raise _NotPlain(f"{line}: nested deeper than {MAX_DEPTH} levels.")
        anchored = not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None) is not None
        self._depth += 1
        self._inside_anchors += anchored
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1
            self._inside_anchors -= anchored

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in (f"{_CORE}int", f"{_CORE}float") and len(node.value) > LONGEST_NUMBER:
            raise _NotPlain(f"{node.start_mark.line + 1}: a number of {len(node.value)} characters is too long.")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != f"{_CORE}str":
                raise _NotPlain(f"{line}: {key.value!r} is not a valid setting name.")
            if key.value in seen:
                raise _NotPlain(f"{line}: {key.value!r} is given twice.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _sixties_as_text(loader: type[yaml.SafeLoader]) -> None:
    """Let ``14:00:00`` be text, as it is in YAML 1.2: YAML 1.1 takes it for 50400, a number to the base of 60."""

    def construct(self: Any, node: Any) -> Any:
        if ":" in node.value:
            return self.construct_yaml_str(node)
        kind = node.tag.removeprefix(_CORE)
        return getattr(self, f"construct_yaml_{kind}")(node)

    for kind in ("int", "float"):
        loader.add_constructor(f"{_CORE}{kind}", construct)


_sixties_as_text(_PlainLoader)
# A date is text here.
_PlainLoader.add_constructor(f"{_CORE}timestamp", yaml.SafeLoader.construct_yaml_str)
