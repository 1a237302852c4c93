"""Import Megatron without loading torch's compiler: what it decorates is compiled when first called.

Megatron decorates its fusions with ``torch.compile`` at import, which loads torch's compiler in every process, also in
one that only writes down a recipe: about half of the time Megatron takes to import. The package activates this, so that
it does not matter which module asks for Megatron first; it loads next to nothing itself.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mixtral_recipes.system import imports

# The modules of Megatron's that take ``torch.compile`` at import: the others take the first one's decorator.
_TAKING = ("megatron.core.jit", "megatron.core.transformer.moe.router")
_eager = False


def activate() -> None:
    """Defer compilation from Megatron's first import on. Idempotent; too late once Megatron is imported."""
    imports.around(compiling_later, *_TAKING)


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Defer what is decorated inside, and later with a decorator that was taken inside."""
    import torch

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
        import torch

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
