"""What user buffers are asked for, held against Transformer Engine's own function; setting them up takes GPUs."""

import inspect
from typing import Any

import pytest

from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import with_topology
from mixtral_recipes.training import user_buffers
from tests.distributed.small_run import small_config


def test_transformer_engine_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch.module import base  # pyright: ignore[reportMissingImports]

    signature = inspect.signature(base.initialize_ub)
    taken: dict[str, Any] = {}
    monkeypatch.setattr(base, "initialize_ub", lambda **named: taken.update(signature.bind(**named).arguments))
    monkeypatch.setattr(user_buffers, "transformer_engine_usable", lambda: True)
    two = Topology(2, tensor_model_parallel_size=2, sequence_parallel=True)
    user_buffers.start(with_topology(small_config(), two), BatchShape(8, 4, 64))
    assert taken["shape"] == [256, 32]
    assert taken["quantization_modes"] == [base.UserBufferQuantizationMode.NONE]
    assert user_buffers._modes(small_config(), base.UserBufferQuantizationMode) == taken["quantization_modes"]
