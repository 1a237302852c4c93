"""Weights that are kept in FP8, written to a checkpoint and read from one (`fp8_on_cpu`)."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.writer import write_file, write_metadata
from mixtral_recipes.checkpoints.fp8 import (
    StandIn,
    forget_first_values,
    fp8_state,
    set_fp8_state,
    take_all,
    unmoved_fp8_state,
)
from mixtral_recipes.checkpoints.shards import model_shards, optimizer_shards
from mixtral_recipes.overrides import loading
from tests.te.conftest import BuildRank, OnMeta
from tests.te.fp8_on_cpu import in_fp8, stand_in_for_the_kernel

SMALL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
         "kv_channels": 16, "vocab_size": 256}  # fmt: skip


@pytest.fixture(autouse=True)
def quantizing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_the_kernel(monkeypatch)


@pytest.fixture
def with_model(build_rank: BuildRank) -> Callable[..., Any]:
    """A function (inside, fp8_recipe) that calls ``inside`` with a small model on one rank."""

    def build(inside: Callable[[list[Any]], Any], fp8_recipe: str = "tensorwise") -> Any:
        recipe = loading.load("mixtral_8x7b", "pretrain", num_nodes=1, num_gpus_per_node=1)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
            setattr(recipe.trainer.strategy, name, 1)
        recipe.trainer.strategy.sequence_parallel = False
        recipe.trainer.strategy.virtual_pipeline_model_parallel_size = None
        recipe.trainer.strategy.context_parallel_size = 1
        for name, value in SMALL.items():
            setattr(recipe.model.config, name, value)
        recipe.trainer.plugins.fp8, recipe.trainer.plugins.fp8_recipe = "hybrid", fp8_recipe
        return build_rank(recipe, 0, "h100", inside)

    return build


def fill(chunks: list[Any], seed: int) -> None:
    """Random weights on the CPU: linear layers' in FP8, as `quantized_model_init` makes them, the rest in bf16."""
    torch.manual_seed(seed)
    for module in chunks[0].modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            weight = torch.randn(meta.shape, dtype=torch.bfloat16)
            linear = hasattr(module, "fp8_meta") and meta.dim() == 2
            module._parameters[name] = in_fp8(weight) if linear else torch.nn.Parameter(weight)


def quantized(chunks: list[Any]) -> dict[str, Any]:
    return {name: p for name, p in chunks[0].named_parameters() if is_float8tensor(p)}


def write(chunks: list[Any], folder: Path) -> None:
    shards = model_shards(chunks, adapters_only=False)
    take_all(shard.stand_in for shard in shards)
    folder.mkdir()
    write_metadata(folder, [write_file(folder, 0, shards, {})])


def test_weights_are_read_as_they_were_written(with_model: Callable[..., Any], tmp_path: Path) -> None:
    def write_and_read(chunks: list[Any]) -> None:
        fill(chunks, seed=1)
        layers = SMALL["num_layers"]
        assert len(quantized(chunks)) == layers * (2 + 2 * chunks[0].config.num_moe_experts)
        codes = {name: parameter._data.clone() for name, parameter in quantized(chunks).items()}
        values = {name: parameter.dequantize() for name, parameter in quantized(chunks).items()}
        plain = {name: p.detach().clone() for name, p in chunks[0].named_parameters() if name not in codes}
        write(chunks, tmp_path / "weights")

        fill(chunks, seed=2)
        StoredWeights(tmp_path / "weights").read_into(model_shards(chunks, adapters_only=False))
        for name, parameter in chunks[0].named_parameters():
            if name in codes:
                assert torch.equal(parameter._data, codes[name]), name
                # What the optimizer takes its fp32 weights from.
                assert torch.equal(parameter.get_high_precision_init_val(), values[name]), name
            else:
                assert torch.equal(parameter, plain[name]), name

    with_model(write_and_read)


@pytest.mark.parametrize("delayed", [False, True], ids=["tensorwise", "delayed"])
def test_a_weight_is_scaled_by_what_it_is(delayed: bool) -> None:
    """Delayed scaling's factor is 1 at first, and frozen weights are quantized once: a Mixtral's are far below 1."""
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 5e-3
    parameter = in_fp8(torch.ones(64, 64, dtype=torch.bfloat16), delayed=delayed)
    stand_in = StandIn.of(parameter)
    assert stand_in is not None
    stand_in.tensor.copy_(values)
    stand_in.put_back()
    error = (parameter.dequantize() - values).float().norm() / values.float().norm()
    assert error < 0.03  # three bits behind the point
    assert not stand_in.tensor.any(), "its memory was not given back"


def test_first_values_are_kept_for_an_optimizer_only() -> None:
    trained, frozen = (in_fp8(torch.randn(8, 8).bfloat16()) for _ in range(2))
    frozen.requires_grad_(False)
    model = torch.nn.ParameterList([trained, frozen])
    forget_first_values([model])
    assert trained.get_high_precision_init_val() is not None
    assert frozen.get_high_precision_init_val() is None


def test_an_optimizers_state_is_cut_like_the_weights(with_model: Callable[..., Any]) -> None:
    def cut(chunks: list[Any]) -> None:
        fill(chunks, seed=1)
        state = {}
        for parameter in chunks[0].parameters():
            parameter.main_param = torch.randn(parameter.shape)
            state[parameter.main_param] = {"exp_avg": torch.randn(parameter.shape)}
        optimizer: Any = SimpleNamespace(optimizer=SimpleNamespace(state=state))
        shards = optimizer_shards(optimizer, chunks, adapters_only=False)
        moments = [shard for shard in shards if "exp_avg" in shard.key]
        weights = model_shards(chunks, adapters_only=False)
        assert {(s.key.removeprefix("optimizer.state.exp_avg."), s.offsets) for s in moments} == {
            (s.key, s.offsets) for s in weights
        }
        first = chunks[0].decoder.layers[0].mlp.experts.linear_fc1.weight0  # the gate's rows before the others
        halves = [s for s in moments if ".experts.linear_fc1" in s.key and s.offsets[:2] == (0, 0)]
        together = torch.cat([s.tensor for s in sorted(halves, key=lambda s: (s.key, s.offsets))])
        assert torch.equal(together, state[first.main_param]["exp_avg"].flatten())

    with_model(cut)


@pytest.mark.parametrize("made_before", [True, False], ids=["with FP8 weights", "without"])
def test_delayed_scalings_state_is_taken_up(with_model: Callable[..., Any], made_before: bool) -> None:
    """Modules with FP8 weights make their state when they are built, the others in the first forward pass."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState

    def take_up(chunks: list[Any]) -> None:
        fill(chunks, seed=1)
        recipe = get_fp8_recipe(chunks[0].config)
        modules = [m for m in chunks[0].modules() if hasattr(m, "fp8_meta") and hasattr(m, "init_fp8_meta_tensors")]
        assert fp8_state(chunks) == {}
        for module in modules:
            attention = hasattr(module, "softmax_scale")
            module.fp8_meta["num_gemms"] = products = 3 if attention else 1
            for direction, mode, each in (("scaling_fwd", "forward", 3), ("scaling_bwd", "backward", 2)):
                new = DelayedScalingRecipeState(
                    recipe, mode=mode, num_quantizers=each * products, device=torch.device("cpu")
                )
                new.scale.uniform_()
                new.amax_history.uniform_()
                module.fp8_meta[direction] = new
        stored = {place: tensor.clone() for place, tensor in fp8_state(chunks).items()}
        assert len(stored) == 4 * len(modules) > 0

        for module in modules:
            for direction in ("scaling_fwd", "scaling_bwd"):
                if made_before:
                    module.fp8_meta[direction].scale.zero_()
                    module.fp8_meta[direction].amax_history.zero_()
                else:
                    del module.fp8_meta[direction]
        set_fp8_state(chunks, stored)
        for module in modules:
            if not made_before:
                with OnMeta():  # the first forward pass; new buffers would be on the GPU
                    module.init_fp8_meta_tensors(recipe)
        found = fp8_state(chunks)
        assert found.keys() == stored.keys()
        for place, tensor in found.items():
            assert torch.equal(tensor, stored[place]), place

    with_model(take_up, "delayed")


def test_validation_does_not_move_delayed_scalings_state(with_model: Callable[..., Any]) -> None:
    """States that are there stay as they are; those that a forward pass makes are left as new."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState

    def validate(chunks: list[Any]) -> None:
        recipe = get_fp8_recipe(chunks[0].config)
        modules = [m for m in chunks[0].modules() if hasattr(m, "fp8_meta")]
        there, later = modules[::2], modules[1::2]

        def make(module: Any) -> None:
            module.fp8_meta["scaling_fwd"] = DelayedScalingRecipeState(
                recipe, mode="forward", num_quantizers=3, device=torch.device("cpu")
            )

        for module in there:
            make(module)
            module.fp8_meta["scaling_fwd"].scale.uniform_()
        before = {place: tensor.clone() for place, tensor in fp8_state(chunks).items()}
        places = {id(m): m.fp8_meta["scaling_fwd"].amax_history.data_ptr() for m in there}
        with unmoved_fp8_state(chunks):
            for module in later:
                make(module)
            for module in modules:
                module.fp8_meta["scaling_fwd"].amax_history[0].fill_(3.0)
                module.fp8_meta["scaling_fwd"].scale.fill_(7.0)
        after = fp8_state(chunks)
        assert all(torch.equal(after[place], tensor) for place, tensor in before.items())
        assert len(after) == 2 * len(modules)
        for module in later:
            state = module.fp8_meta["scaling_fwd"]
            assert (state.scale == 1).all()
            assert (state.amax_history == 0).all()
        # Transformer Engine's own lists point at these buffers.
        assert places == {id(m): m.fp8_meta["scaling_fwd"].amax_history.data_ptr() for m in there}

    with_model(validate, "delayed")
