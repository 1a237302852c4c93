"""Overlapped tensor-parallel communication: refused where there is none, set up as Transformer Engine wants it."""

import enum
import sys
import types
from typing import Any

import fiddle
import nemo_run as run
import pytest
import torch

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import with_topology
from mixtral_recipes.overrides.loading import load
from mixtral_recipes.training import user_buffers
from mixtral_recipes.training.model import check_megatron_config
from tests.distributed.small_run import small_config

TWO = Topology(2, tensor_model_parallel_size=2, sequence_parallel=True)


class Modes(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Transformer Engine is asked for."""
    calls: list[dict[str, Any]] = []
    base = types.SimpleNamespace(
        UserBufferQuantizationMode=Modes,
        destroy_ub=calls.clear,
        initialize_ub=lambda **named: calls.append(named),
    )
    module = types.ModuleType("transformer_engine.pytorch.module")
    module.base = base  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", module)
    monkeypatch.setattr(user_buffers, "transformer_engine_usable", lambda: True)
    config = with_topology(small_config(), TWO)
    for _ in range(2):  # a second run in the process starts afresh
        user_buffers.start(config, BatchShape(global_batch_size=8, micro_batch_size=4, seq_length=64))
    (call,) = calls
    return call


def test_buffers_hold_a_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    call = asked(monkeypatch)
    assert call["shape"] == [4 * 64, small_config().hidden_size]
    assert call["tp_size"] == 2
    assert call["quantization_modes"] == [Modes.NONE]
    assert call["dtype"] is torch.float32
    assert call["bootstrap_backend"] == "nccl"


@pytest.mark.parametrize(("ends", "modes"), [(0, [Modes.FP8]), (1, [Modes.FP8, Modes.NONE])])
def test_fp8_has_its_own_and_layers_in_bf16_too(ends: int, modes: list[Modes]) -> None:
    config = small_config()
    config.fp8, config.first_last_layers_bf16 = "hybrid", True  # as set on a GPU; Megatron looks for its libraries
    config.num_layers_at_start_in_bf16 = config.num_layers_at_end_in_bf16 = ends
    assert user_buffers._modes(config, Modes) == modes


def test_without_transformer_engine_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_buffers, "transformer_engine_usable", lambda: False)
    with pytest.raises(RecipeError, match="needs Transformer Engine, which is not installed"):
        user_buffers.start(with_topology(small_config(), TWO), BatchShape(8, 4, 64))


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_anything_to_overlap_it_is_refused(ranks: int) -> None:
    recipe = load("mixtral_8x7b", "pretrain", num_nodes=1, num_gpus_per_node=8)
    recipe.trainer.strategy.tensor_model_parallel_size, recipe.trainer.strategy.sequence_parallel = ranks, False
    recipe.trainer.accelerator = "gpu"
    recipe.trainer.callbacks = [run.Config(llm.MegatronCommOverlapCallback, tp_comm_overlap=True)]

    built: Any = fiddle.build(recipe)
    with pytest.raises(RecipeError, match=rf"parallel_size={ranks} and sequence_parallel=False; set both, or leave"):
        check_megatron_config(built.keywords["model"].config, built.keywords["trainer"])
