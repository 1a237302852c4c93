"""Megatron is imported without torch's compiler, and its fusions still work, compiled or not."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from mixtral_recipes.cpu import lazy_compile

ASK = """
import sys, warnings
warnings.simplefilter("ignore")
import mixtral_recipes.models.config
print("torch._inductor" in sys.modules, torch.compile.__name__ if (torch := sys.modules["torch"]) else "")
from megatron.core.fusions.fused_bias_swiglu import swiglu
from mixtral_recipes.cpu import lazy_compile
lazy_compile.run_eagerly(True)
print(swiglu(torch.ones(2, 4)).shape, "torch._inductor" in sys.modules)
"""


@pytest.mark.parametrize(
    "first",
    [
        "mixtral_recipes.models.config",
        "mixtral_recipes; import megatron.core.utils",
        "mixtral_recipes.system.late_imports as late; late.activate(); import mixtral_recipes.inference.model",
    ],
    ids=["by a recipe", "by anyone", "by a command"],
)
def test_importing_megatron_leaves_the_compiler_out(first: str) -> None:
    ask = ASK.replace("mixtral_recipes.models.config", first)
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["False compile", "torch.Size([2, 2]) False"]


def test_a_deferred_function_is_compiled_once_and_only_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(lazy_compile, "_eager", False)
    with lazy_compile.compiling_later():

        @torch.compile
        def plain(x: int) -> int:
            return x + 1

        @torch.compile(dynamic=True)
        def with_options(x: int) -> int:
            return x + 2

    assert torch.compile is compile_
    assert compiled == []
    assert (plain(1), plain(2), with_options(1)) == (102, 103, 103)
    assert compiled == [("plain", {}), ("with_options", {"dynamic": True})]
    monkeypatch.setattr(lazy_compile, "_eager", True)
    assert plain(1) == 2
