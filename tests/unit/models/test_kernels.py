"""What a run computes with, and what it says where that could be better; Transformer Engine is stood in for."""

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.models import kernels
from mixtral_recipes.models.config import MixtralConfigTiny

WHY = "Disabling FusedAttention: no support for this head dimension"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def engine(gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Transformer Engine that answers what the dictionary says."""
    says: dict[str, Any] = {"cudnn": (9, 24, 0), "unfused": False, "flash": False, "none": False, "asked": None}

    class Logging:
        _log_level = logging.WARNING

    def choose(asked: Any) -> tuple[Any, ...]:
        says["asked"] = asked
        logger = logging.getLogger("DotProductAttention")
        logger.setLevel(Logging._log_level)
        logger.debug("Running with config=...")
        if says["unfused"]:
            logger.debug(WHY)
        if says["none"]:
            logger.debug(WHY)
        fused = not (says["unfused"] or says["flash"] or says["none"])
        return says["flash"], None, fused, 1 if fused else None, says["unfused"], [True, True, True]

    utils = SimpleNamespace(AttentionParams=SimpleNamespace, AttentionLogging=Logging, get_attention_backend=choose)
    names = ["", ".pytorch", ".pytorch.utils", ".pytorch.attention", ".pytorch.attention.dot_product_attention"]
    modules = {name: ModuleType(f"transformer_engine{name}") for name in names}
    vars(modules[".pytorch.utils"])["get_cudnn_version"] = lambda: says["cudnn"]
    vars(modules[".pytorch.attention.dot_product_attention"])["utils"] = utils
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "package_version", lambda name: "2.20.2")
    monkeypatch.setattr(kernels, "no_compiler", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    return says


def found(length: int = 4096, *, packed: bool = False) -> kernels.Kernels | None:
    return kernels.in_use(MixtralConfigTiny(), length=length, packed=packed)


def test_a_cpu_has_none() -> None:
    assert found() is None


def test_plain_layers_on_a_gpu_are_told(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    seen = found()
    assert seen is not None
    assert str(seen) == "layers: PyTorch; attention: sdpa"
    assert kernels.INSTALL in seen.notes[0]


def test_a_run_says_that_nothing_can_be_compiled(engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "no_compiler", lambda: "no Python.h")
    seen = found()
    assert seen is not None
    (note,) = seen.notes
    assert note.startswith("no Python.h: kernels that are compiled on first use are left out, which is slower; install")


@pytest.mark.parametrize("error", [OSError("libcudnn_heuristic.so.9: undefined symbol: x"), ImportError("no cublas")])
def test_a_broken_installation_is_an_error(gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("transformer_engine"):
                raise error

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    with pytest.raises(EnvironmentProblem, match=f"installed but cannot be loaded .*{str(error)[:12]}"):
        found()


def test_all_is_well(engine: dict[str, Any]) -> None:
    seen = found(packed=True)
    assert str(seen) == "layers: Transformer Engine 2.20.2; attention: fused (cuDNN 9.24.0)"
    assert seen is not None
    assert seen.notes == ()
    asked = engine["asked"]
    assert (asked.qkv_layout, asked.attn_mask_type, asked.max_seqlen_q) == ("thd_thd_thd", "padding_causal", 4096)
    assert not asked.deterministic
    kernels.in_use(MixtralConfigTiny(deterministic_mode=True), length=4096, packed=False)
    assert engine["asked"].deterministic
    engine["flash"] = True
    assert "attention: flash" in str(found())


def test_two_cudnns(engine: dict[str, Any]) -> None:
    engine["cudnn"] = (9, 1, 0)
    seen = found()
    assert seen is not None
    assert "torch uses 9.24.0, but Transformer Engine loads 9.1.0. export CUDNN_HOME=" in seen.notes[0]


def test_unfused_attention_is_told_and_long_refused(engine: dict[str, Any]) -> None:
    engine["unfused"] = True
    seen = found(8192)
    assert seen is not None
    assert seen.attention == "unfused"
    assert WHY in seen.notes[0]
    with pytest.raises(EnvironmentProblem, match=r"over 16,384 tokens would be unfused .*no support for this head"):
        found(16384)
    assert not logging.getLogger("DotProductAttention").handlers


@pytest.mark.parametrize("installed", [False, True])
def test_no_attention_kernel_at_all_is_refused(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    engine["none"] = True
    monkeypatch.setattr(kernels, "find_spec", lambda name: installed if "flash" in name else object())
    with pytest.raises(EnvironmentProblem, match=r"no support for this head .*attention_backend=auto") as caught:
        found()
    assert ("flash-attn is not installed" in str(caught.value)) is not installed
