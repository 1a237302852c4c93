"""Import Megatron without loading torch's compiler: what it decorates is compiled when first called.

Megatron decorates its fusions with ``torch.compile`` at import, which loads torch's compiler in every process, also in
one that only writes down a recipe: about half of the time Megatron takes to import.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_eager = False


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Import Megatron for the first time inside this; functions it decorates later are deferred too."""
    compile_now = torch.compile
    torch.compile = functools.partial(_deferred, compile_now)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.compile = compile_now


def run_eagerly(eager: bool) -> None:
    """Whether functions run uncompiled, deferred or not."""
    global _eager
    _eager = eager
    if "torch._dynamo" in sys.modules:  # the compiler is there: Megatron may have come before us
        torch.compiler.set_stance("force_eager" if eager else "default")


def _deferred(compile_now: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """``torch.compile``, at the first call."""
    if function is None:
        return functools.partial(_deferred, compile_now, **options)
    compiled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if _eager:
            return function(*args, **named)
        if not compiled:
            compiled.append(compile_now(function, **options))
        return compiled[0](*args, **named)

    return call
