"""Layers in plain PyTorch, as a GPU has them."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.backends import cuda

from mixtral_recipes.models import attention, cached_attention
from mixtral_recipes.models.attention import RMSNorm, kernels_for_any_length


def test_a_norm_is_made_on_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under adapters nothing would move it there later."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config: Any = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    assert RMSNorm(config, 8).weight.is_meta


def test_lengths_that_change_are_not_planned_anew() -> None:
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    before = cuda.cudnn_sdp_enabled()
    with kernels_for_any_length(on_a_gpu):
        assert cuda.flash_sdp_enabled()
        assert cuda.mem_efficient_sdp_enabled()
        assert cuda.math_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()
    assert cuda.cudnn_sdp_enabled() == before


def test_packed_sequences_change_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """And generation's."""
    seen = []

    def kernels(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        seen.append(tuple(x.shape))
        return contextlib.nullcontext()

    for module in (attention, cached_attention):
        monkeypatch.setattr(module, "kernels_for_any_length", kernels)
    config: Any = SimpleNamespace(
        attention_dropout=0.0, deterministic_mode=False, kv_channels=8, context_parallel_size=1
    )
    core = attention.CoreAttention(config, 1, AttnMaskType.causal, "self")
    packed: Any = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 3, 5]))
    x = torch.randn(5, 2, 8)
    assert core(x, x, x, packed_seq_params=packed).shape == (5, 16)
    cache = cached_attention.KeyValueCache(rows=1, length=4)
    angles = torch.randn(4, 1, 1, 8)
    cache.begin_prompts(0)
    cache.attend(1, torch.randn(2, 1, 1, 4, 8), angles)
    cache.begin_tokens([2], torch.device("cpu"))
    cache.attend(1, torch.randn(1, 1, 1, 4, 8), angles)
    assert seen == [(5, 2, 8), (2, 1, 1, 2, 8), (1, 1, 1, 2, 8)]
