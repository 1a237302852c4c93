"""Callbacks that nothing would call are refused, with what to write instead."""

import types
from typing import Any

import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings import callbacks
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.nemo.modules import of_nemo


class Good:
    def on_step_end(self, run: Any, metrics: Any) -> None: ...


class BatchEnd:
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...


class SameName:
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None: ...


class Unheard:
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None: ...


class Hookless:
    def on(self) -> None: ...


class OfLightning(type("Callback", (), {"__module__": "lightning.pytorch.callbacks.callback"})):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (BatchEnd, "defines on_train_batch_end, which is never called; use on_step_end(self, run, metrics)"),
        (SameName, "as for Lightning; use on_validation_end(self, run, metrics)"),
        (Unheard, "defines on_save_checkpoint, which is never called; the hooks are check(topology), "),
        (Hookless, "defines none of these hooks: check(topology), "),
        (OfLightning, "derives from Lightning's Callback"),
        (llm.ModelCheckpoint, "belongs in log.ckpt"),
        (llm.LoRA, "defines none of these hooks"),
    ],
)
def test_what_nothing_would_call_is_refused(target: Any, told: str) -> None:
    for callback in (run.Config(target), target()):
        assert told in next(callbacks.refused([Good(), callback]))
    recipe = llm.mixtral_tiny.pretrain_recipe()
    recipe.trainer.callbacks = [Good(), target()]
    with pytest.raises(RecipeError) as refused:
        check_settings(llm.pretrain, {"trainer": recipe.trainer})
    assert f"trainer.callbacks[1]={target.__name__} " in str(refused.value)


def test_a_class_is_no_callback() -> None:
    assert list(callbacks.refused([Good])) == ["trainer.callbacks[0]=Good is a class; use Good()."]


def test_every_callback_that_is_here_is_taken() -> None:
    from mixtral_recipes.settings.nemo.names import NAMES
    from mixtral_recipes.settings.nemo.rules import Ignored

    ours = [run.Config(getattr(llm, name)) for name in dir(llm) if name.endswith("Callback")]
    theirs = [run.Config(of_nemo(name)) for name, rule in NAMES.items() if isinstance(rule, Ignored)]
    assert len(ours) > 7
    assert list(callbacks.refused([*ours, *theirs, Good(), run.Config(Good)])) == []


def test_the_hooks_are_those_the_loop_calls() -> None:
    import ast
    import inspect

    from mixtral_recipes.executors import preflight
    from mixtral_recipes.training import loop, model

    called: set[str] = set()
    for module in (loop, model, preflight):
        assert isinstance(module, types.ModuleType)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "callbacks.call":
                called.add(ast.literal_eval(node.args[1]))
    assert called == set(callbacks.HOOKS)
