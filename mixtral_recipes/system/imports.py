"""Do something where another package's module is imported, whoever asks for it first. Loads next to nothing itself."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from typing import Any

_contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {}


def around(context: Callable[[], AbstractContextManager[None]], *names: str) -> None:
    """Have modules executed inside a context. Idempotent; too late for those that are imported.

    Args:
        context: Makes it; called once for each module.
        names: Their dotted names.
    """
    _contexts.update(dict.fromkeys(names, context))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # pyright: ignore[reportArgumentType]


class _Finder:
    """Wraps what executes such a module; where it is, the other finders say."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in _contexts:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: Any) -> None:
                with _contexts[name]():
                    execute(module)

            spec.loader.exec_module = executed  # pyright: ignore[reportAttributeAccessIssue]
        return spec
