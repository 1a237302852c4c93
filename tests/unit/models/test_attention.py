"""Layers in plain PyTorch, as a GPU has them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_recipes.models.attention import RMSNorm


def test_a_norm_is_made_on_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under adapters nothing would move it there later."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config: Any = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    assert RMSNorm(config, 8).weight.is_meta
