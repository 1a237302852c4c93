"""Every router option and every way to recompute runs on a GPU, and changes what it should and nothing else."""

import functools
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.models.kernels import transformer_engine_usable
from mixtral_recipes.settings.peft import LoRA
from tests.gpu.small_runs import FP8, Watched, train

STEPS = 3
ADAPTERS = LoRA(dim=8, alpha=16, dropout=0.0)
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform": FULL | {"recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform by two": FULL | {"recompute_method": "uniform", "recompute_num_layers": 2},
    "block": FULL | {"recompute_method": "block", "recompute_num_layers": 1},
    **{name: SELECTIVE | {"recompute_modules": [name]} for name in ("core_attn", "mlp", "moe", "layernorm", "moe_act")},
    "several": SELECTIVE | {"recompute_modules": ["core_attn", "layernorm", "moe_act"]},
}
ONLY_TRANSFORMER_ENGINE = {"layernorm", "moe_act", "several"}
# What says the same in other words, and what routes otherwise.
ROUTED_ALIKE: dict[str, dict[str, Any]] = {
    "fp64 router": {"moe_router_dtype": "fp64"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "all four experts' room": {"moe_expert_capacity_factor": 4.0},
    "not accelerated": {"accelerate": False},
}
ROUTED_OTHERWISE: dict[str, dict[str, Any]] = {
    "sequences": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global": {"moe_router_load_balancing_type": "global_aux_loss"},
    "two losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.01, 0.01],
    },
    "unbalanced": {"moe_router_load_balancing_type": "none"},
    "one expert": {"moe_router_topk": 1},
    "three experts": {"moe_router_topk": 3},
    "z loss": {"moe_z_loss_coeff": 1e-2},
    "jitter": {"moe_input_jitter_eps": 0.1},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "capacity by position": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
    "capacity padded": {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True},
    "frozen": {"freeze_router": True},
}  # fmt: skip


def routers(run: Any) -> dict[str, torch.Tensor]:
    named = run.model[0].named_parameters()
    return {name: weight.detach().float().cpu().clone() for name, weight in named if "router" in name}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return train(tmp_path_factory.mktemp("plain"), steps=STEPS, look=routers)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: str) -> Watched:
    return train(tmp_path_factory.mktemp("adapted"), steps=STEPS, base=base, peft=ADAPTERS)


@pytest.fixture(scope="module")
def plain_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Watched]:
    """By precision; each is trained once."""
    return functools.cache(
        lambda precision: train(tmp_path_factory.mktemp(precision), steps=STEPS, precision=precision)
    )


def near(found: Watched, expected: Watched, rel: float = 5e-3) -> bool:
    """Whether losses and gradients are the same but for bf16's rounding."""
    return all(
        math.isclose(ours, theirs, rel_tol=rel * (1 if which == 0 else 10))
        for step, numbers in expected.numbers.items()
        for which, (ours, theirs) in enumerate(zip(found.numbers[step], numbers, strict=True))
    )


def skip_without_transformer_engine(name: str) -> None:
    if name in ONLY_TRANSFORMER_ENGINE and not transformer_engine_usable():
        pytest.skip("needs Transformer Engine's layers")


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputing_changes_nothing(tmp_path: Path, plain: Watched, name: str) -> None:
    skip_without_transformer_engine(name)
    assert near(train(tmp_path, steps=STEPS, config=RECOMPUTE[name]), plain)


@pytest.mark.parametrize("name", RECOMPUTE)
def test_adapters_are_trained_over_recomputed_layers(tmp_path: Path, base: str, adapted: Watched, name: str) -> None:
    skip_without_transformer_engine(name)
    assert near(train(tmp_path, steps=STEPS, base=base, peft=ADAPTERS, config=RECOMPUTE[name]), adapted)


def test_adapters_are_trained_over_weights_made_on_the_host(tmp_path: Path, base: str, adapted: Watched) -> None:
    assert near(
        train(tmp_path, steps=STEPS, base=base, peft=ADAPTERS, config={"use_cpu_initialization": True}), adapted
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", FP8)
@pytest.mark.parametrize("name", ["uniform", "moe", "several"])  # whole layers, experts, and all parts of one
def test_recomputing_in_fp8(tmp_path: Path, plain_in: Callable[[str], Watched], name: str, precision: str) -> None:
    if precision == "delayed" and name in ONLY_TRANSFORMER_ENGINE:
        pytest.skip("Megatron refuses it with delayed scaling")
    kept = plain_in(precision)
    assert near(train(tmp_path, steps=STEPS, precision=precision, config=RECOMPUTE[name]), kept, rel=2e-2)


@pytest.mark.parametrize("name", ROUTED_ALIKE)
def test_the_same_routing(tmp_path: Path, plain: Watched, name: str) -> None:
    assert near(train(tmp_path, steps=STEPS, config=ROUTED_ALIKE[name]), plain)


@pytest.mark.parametrize("name", ROUTED_OTHERWISE)
def test_another_routing(tmp_path: Path, plain: Watched, name: str) -> None:
    found = train(tmp_path, steps=STEPS, config=ROUTED_OTHERWISE[name], look=routers)
    assert all(math.isfinite(number) for numbers in found.numbers.values() for number in numbers)
    assert found.numbers != plain.numbers
    moved = [not torch.equal(weight, plain.looked[key]) for key, weight in found.looked.items()]
    assert all(moved)
    assert found.losses[STEPS] == pytest.approx(plain.losses[STEPS], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "unfused", "flash"])
def test_attention_is_computed_by_the_kernel_that_is_asked_for(tmp_path: Path, plain: Watched, backend: str) -> None:
    if not transformer_engine_usable():
        pytest.skip("needs Transformer Engine's layers")
    fields = {"attention_backend": AttnBackend[backend]}
    if backend == "flash" and find_spec("flash_attn") is None and find_spec("flash_attn_3") is None:
        with pytest.raises(EnvironmentProblem, match="flash-attn is not installed"):
            train(tmp_path, steps=STEPS, config=fields)
        return
    found = train(tmp_path, steps=STEPS, config=fields, look=lambda run: run.computed_by)
    assert found.looked.attention == backend
    assert near(found, plain)


def test_a_frozen_router_keeps_its_weights(tmp_path: Path) -> None:
    short = train(tmp_path, "one", steps=1, config={"freeze_router": True}, look=routers)
    long = train(tmp_path, "three", steps=3, config={"freeze_router": True}, look=routers)
    assert short.looked.keys() == long.looked.keys()
    assert all(torch.equal(weight, long.looked[name]) for name, weight in short.looked.items())
