"""Ten steps, a restart and ten more are twenty, bit for bit, validations in between.

In deterministic mode: attention's backward pass otherwise adds up in whatever order the card comes to it.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import local_multi_tensor_l2_norm

from mixtral_recipes.checkpoints.fp8 import fp8_state, take_all
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards
from mixtral_recipes.settings.peft import LoRA
from tests.distributed.tiny_job import hash_of
from tests.gpu.small_runs import FP8, train

SCHEMES = {"pretraining": None, "lora": LoRA(dim=8, alpha=16, dropout=0.1)}


def state(run: Any) -> dict[str, str]:
    """A hash of each weight and optimizer state of a run, and of what FP8 scales by."""
    adapters = any(".adapter." in name for name, _ in run.model[0].named_parameters())
    shards = model_shards(run.model, adapters_only=adapters)
    shards += optimizer_shards(run.optimizer, run.model, adapters_only=adapters)
    take_all(shard.stand_in for shard in shards)
    tensors = {str(shard.place): shard.tensor for shard in shards} | fp8_state(run.model)
    return {place: hash_of([tensor.detach().cpu()]) for place, tensor in tensors.items()}


@pytest.mark.parametrize("precision", ["bf16", *(pytest.param(name, marks=pytest.mark.gpu) for name in FP8)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ten_and_ten_are_twenty(tmp_path: Path, base: str, scheme: str, precision: str) -> None:
    peft = SCHEMES[scheme]
    how: dict[str, Any] = {
        "precision": precision, "peft": peft, "base": base if peft else None, "validate_every": 4, "save": True,
        "look": state, "config": {"deterministic_mode": True},
    }  # fmt: skip
    whole = train(tmp_path, "whole", steps=20, **how)
    train(tmp_path, "parts", steps=10, **how)
    late = train(tmp_path, "parts", steps=20, **how)
    assert list(late.losses) == list(range(11, 21))
    assert late.numbers == {step: numbers for step, numbers in whole.numbers.items() if step > 10}
    assert late.validations == {step: loss for step, loss in whole.validations.items() if step > 10}
    assert late.looked == whole.looked


@pytest.mark.parametrize("scheme", SCHEMES)
def test_so_they_are_without_transformer_engine(
    tmp_path: Path, base: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's layers and AdamW, as on a machine where Transformer Engine is not installed."""
    factory = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr("mixtral_recipes.models.builder.transformer_engine_usable", lambda: False)
    monkeypatch.setattr("mixtral_recipes.models.kernels.transformer_engine_usable", lambda: False)
    monkeypatch.setattr(factory, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(factory, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(factory.clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(factory.clip_grads, "multi_tensor_scale_tensor_impl", None)
    test_ten_and_ten_are_twenty(tmp_path, base, scheme, "bf16")
