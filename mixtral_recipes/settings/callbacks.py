"""Which hooks a callback may have; the loop calls them, `training/watch/callbacks.py` says when."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

# Hook -> what it is called with.
HOOKS: dict[str, tuple[str, ...]] = {
    "check": ("topology",),
    "configure": ("settings",),
    "on_train_start": ("run",),
    "on_step_start": ("run", "step"),
    "on_step_end": ("run", "metrics"),
    "on_validation_end": ("run", "metrics"),
    "on_train_end": ("run",),
}
# Lightning's hook -> ours.
_OURS = {
    **dict.fromkeys(("on_fit_start", "on_sanity_check_start", "on_train_epoch_start"), "on_train_start"),
    **dict.fromkeys(("on_train_batch_start", "on_before_zero_grad", "on_before_backward"), "on_step_start"),
    **dict.fromkeys(("on_train_batch_end", "on_after_backward", "on_before_optimizer_step"), "on_step_end"),
    **dict.fromkeys(("on_validation_start", "on_validation_epoch_end", "on_validation_batch_end"), "on_validation_end"),
    **dict.fromkeys(("on_fit_end", "on_train_epoch_end", "on_exception"), "on_train_end"),
}
_LIGHTNING = ("lightning.", "pytorch_lightning.")
_NEEDLESS = ("mixtral_recipes.training.watch.", "mixtral_recipes.settings.nemo.")


def refused(given: Any) -> Iterator[str]:
    """Why callbacks cannot be used: nothing would call them, or with other arguments than they take.

    Args:
        given: ``trainer.callbacks``, configs or objects.
    """
    import fiddle as fdl  # `migrate` reads this file without it

    for number, callback in enumerate(given if isinstance(given, list | tuple) else []):
        target: Any = fdl.get_callable(callback) if isinstance(callback, fdl.Buildable) else type(callback)
        if isinstance(callback, type):
            yield f"trainer.callbacks[{number}]={callback.__name__} is a class; use {callback.__name__}()."
        elif isinstance(callback, fdl.Partial | functools.partial):
            yield f"trainer.callbacks[{number}] is a partial, which makes no object; use run.Config(CLASS, ...)."
        elif isinstance(target, type) and not target.__module__.startswith(_NEEDLESS):
            why = _why_not(target)
            if why:
                yield f"trainer.callbacks[{number}]={target.__name__} {why}."


def _why_not(target: type) -> str | None:
    """Why a callback of a class cannot be used; None where it can."""
    if target.__module__ == "mixtral_recipes.settings.checkpoint":
        return "belongs in log.ckpt"
    if any(base.__module__.startswith(_LIGHTNING) for base in target.__mro__):
        return (
            f"derives from Lightning's Callback, but Lightning is not used; drop that base and define some of {_ours()}"
        )
    for name in filter(lambda name: name.startswith("on_"), dir(target)):
        why = of_lightning(name, list(inspect.signature(getattr(target, name)).parameters))
        if why:
            return why
    return None if any(hasattr(target, name) for name in HOOKS) else f"defines none of these hooks: {_ours()}"


def of_lightning(name: str, parameters: list[str]) -> str | None:
    """What to write for a hook of Lightning's; None for one of ours.

    Args:
        name: A method whose name begins with ``on_``.
        parameters: The names of its arguments.
    """
    if name not in HOOKS:
        ours = _OURS.get(name)
        return f"defines {name}, which is never called; " + (
            f"use {_signature(ours)}" if ours else f"the hooks are {_ours()}"
        )
    if "pl_module" in parameters:
        return f"defines {name}(trainer, pl_module) as for Lightning; use {_signature(name)}"
    return None


def _signature(hook: str) -> str:
    return f"{hook}(self, {', '.join(HOOKS[hook])})"


def _ours() -> str:
    return ", ".join(f"{name}({', '.join(arguments)})" for name, arguments in HOOKS.items())
