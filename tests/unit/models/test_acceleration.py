"""What only Transformer Engine's layers do is refused where a model is not built of them, before anything starts."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

from mixtral_recipes.errors import EnvironmentProblem, RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models import acceleration, kernels
from mixtral_recipes.models.acceleration import KNOBS, accelerated, refuse_without
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfigTiny
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import run
from mixtral_recipes.training.model import check_megatron_config
from tests.fake_world import one_of

SELECTIVE = {"recompute_granularity": "selective"}
REFUSED = {
    "moe_act": (
        SELECTIVE | {"recompute_modules": ["moe_act"], "moe_grouped_gemm": True},
        r"\['moe_act'\] .* \['moe'\]",
    ),
    "layernorm": (SELECTIVE | {"recompute_modules": ["layernorm"]}, r"\['layernorm'\] .* \['moe'\]"),
    "router kernel": ({"moe_router_fusion": True}, "moe_router_fusion=True .* leave it out"),
    "cross entropy": ({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, "use 'native'"),
    "gradients": ({"gradient_accumulation_fusion": True}, "Transformer Engine or Apex"),
    "offloading": ({"cpu_offloading": True, "cpu_offloading_num_layers": 1}, "cpu_offloading=True"),
    "fine-grained offloading": (
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]},
        "fine_grained_activation_offloading=True .* recompute layers",
    ),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout .* set it to 0"),
    "sinkhorn": ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn' is not how Mixtral routes"),
    "quantiles": ({"moe_router_load_balancing_type": "quantile_balancing"}, "use aux_loss, .* none"),
    "one of two": (
        {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"], "moe_aux_loss_coeff": [0.1, 0.0]},
        "is not how Mixtral routes",
    ),
    "flex": ({"moe_token_dispatcher_type": "flex"}, "expert_model_parallel_size"),
}
RUN = {
    "nothing": {},
    "attention": SELECTIVE | {"recompute_modules": ["core_attn", "moe"]},
    "norms without granularity": {"recompute_modules": ["layernorm"]},
    "every layer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "native cross entropy": {"cross_entropy_loss_fusion": True},
    "two losses": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]},
}


def check(fields: dict[str, Any], **layout: Any) -> None:
    plugins = MegatronMixedPrecision(precision="32")
    trainer = Trainer(
        accelerator="cpu", plugins=plugins, strategy=MegatronStrategy(**layout), devices=2 if layout else 1
    )
    check_megatron_config(MixtralConfigTiny(**fields), trainer)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_what_to_do(case: str) -> None:
    fields, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        check(fields)


@pytest.mark.parametrize("case", RUN)
def test_what_the_plain_layers_do_is_not(case: str) -> None:
    check(RUN[case])


@pytest.mark.parametrize(
    ("kinds", "ranks", "said"),
    [
        ("ring", 1, "cp_comm_type='ring' is not supported; use p2p, all_gather, a2a"),
        ("a2a+p2p", 2, "cp_comm_type='a2a.p2p' is not supported"),
        (["p2p", "p2p", "p2p", "x"], 2, "cp_comm_type='x' is not supported"),
        ("a2a", 4, "context_parallel_size=4 does not divide num_query_groups .* = 2; use p2p or all_gather"),
    ],
)
def test_an_exchange_that_context_parallel_attention_does_not_have(
    kinds: str | list[str], ranks: int, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check({"cp_comm_type": kinds}, context_parallel_size=ranks)


@pytest.mark.parametrize("kinds", ["p2p", "all_gather", "a2a", ["p2p", "a2a", "a2a", "all_gather"]])
def test_an_exchange_that_it_has(kinds: str | list[str]) -> None:
    check({"cp_comm_type": kinds}, context_parallel_size=2)


def test_flex_is_for_several_ranks() -> None:
    check({"moe_token_dispatcher_type": "flex"}, expert_model_parallel_size=2)


@pytest.mark.parametrize("backend", ["deepep", "hybridep", "ncclep"])
def test_a_flex_dispatcher_needs_its_package(backend: str) -> None:
    config = MixtralConfigTiny(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend)
    with pytest.raises(EnvironmentProblem, match=f"backend='{backend}' needs .* use .*=alltoall"):
        build_model(config)


def test_over_a_quantised_base_only_grouped_experts_are_missing() -> None:
    refuse_without(MixtralConfigTiny(**SELECTIVE, recompute_modules=["layernorm"]), grouped_only=True)
    with pytest.raises(RecipeError, match="moe_act"):
        refuse_without(MixtralConfigTiny(**SELECTIVE, recompute_modules=["moe_act"]), grouped_only=True)


@pytest.mark.parametrize("field", ["moe_permute_fusion", "apply_rope_fusion"])
def test_a_kernel_that_is_not_installed_is_said_so_by_the_command_line(field: str, tmp_path: Path) -> None:
    """There Megatron is imported late, and in the order of what asks for it."""
    command = [
        sys.executable, "-m", "mixtral_recipes.cli.main", "pretrain", "--recipe", "mixtral_tiny", "--dir",
        str(tmp_path), "--dry-run", f"model.config.{field}=true",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*(not available|leave it out).*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("fields", "fused"),
    [
        ({}, True),
        ({"moe_router_dtype": "fp32"}, True),
        ({"moe_router_dtype": "fp64"}, False),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, False),
        ({"moe_enable_routing_replay": True}, False),
        ({"moe_router_topk": 1}, False),
    ],
)
def test_the_router_is_fused_where_its_kernel_takes_it(
    fields: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    assert accelerated(MixtralConfigTiny(**fields), adapters=False)["moe_router_fusion"] is fused


@pytest.mark.parametrize(("installed", "kernel"), [("2.20.0", "te"), ("2.19.1", "native")])
def test_losses_over_the_vocabulary_are_transformer_engines_once_it_rounds_once(
    installed: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: installed)
    fields = accelerated(MixtralConfigTiny(), adapters=False)
    assert fields["cross_entropy_loss_fusion"]
    assert fields.get("cross_entropy_fusion_impl", MixtralConfigTiny().cross_entropy_fusion_impl) == kernel


def test_what_is_given_is_left_alone_but_for_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    everything = {knob.field for knob in KNOBS}
    assert accelerated(MixtralConfigTiny(), adapters=False).keys() == everything
    names = everything - {"cross_entropy_fusion_impl", "gradient_accumulation_fusion"}
    for name in names:
        given = MixtralConfigTiny(**{name: False}).changed(rotary_base=5e5)  # as agreeing with a checkpoint does
        assert name not in accelerated(given, adapters=True), name
    off = accelerated(MixtralConfigTiny(gradient_accumulation_fusion=True), adapters=True)
    assert off["gradient_accumulation_fusion"] is off["defer_embedding_wgrad_compute"] is False


def test_on_a_gpu_without_transformer_engine_torch_compiles_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "transformer_engine_usable", lambda: False)
    monkeypatch.setattr(run, "with_topology", lambda config, topology, **fields: fields)
    settings = {"params_dtype": torch.bfloat16}
    found: Any = run._configured(MixtralConfigTiny(), Topology(1), settings, None, None)
    jitted = {"cross_entropy_loss_fusion", "bias_dropout_fusion", "bias_activation_fusion"}
    assert {name for name, value in found.items() if value is True} == jitted


def test_what_only_grouped_experts_do_is_refused_where_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "transformer_engine_usable", lambda: True)
    monkeypatch.setattr(run, "with_topology", lambda config, topology, **fields: fields)  # Megatron asks for kernels
    fields: dict[str, Any] = SELECTIVE | {"recompute_modules": ["moe_act"]}
    settings = {"params_dtype": torch.bfloat16}
    found: Any = run._configured(MixtralConfigTiny(**fields), Topology(1), settings, None, None)
    assert found["moe_grouped_gemm"]
    with pytest.raises(RecipeError, match=r"moe_act.* needs Transformer Engine's grouped experts"):
        run._configured(MixtralConfigTiny(**fields, moe_grouped_gemm=False), Topology(1), settings, None, None)


def test_what_is_asked_to_be_deterministic_leaves_out_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    free, bound = (accelerated(MixtralConfigTiny(deterministic_mode=asked), adapters=False) for asked in (False, True))
    changed = {name for name, value in free.items() if bound[name] != value}
    assert changed == {"cross_entropy_loss_fusion", "bias_activation_fusion"}


def test_without_a_compiler_triton_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    monkeypatch.setattr(acceleration, "no_compiler", lambda: "no gcc or clang on PATH")
    asked = MixtralConfigTiny(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    found = accelerated(asked, adapters=False)
    assert found["moe_permute_fusion"] is found["cross_entropy_loss_fusion"] is False
    assert found["moe_grouped_gemm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_fused_loss_is_for_bf16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass rounds to bf16, which autograd then turns into fp32 without a word."""
    monkeypatch.setattr(acceleration, "version", lambda package: "2.20.2")
    fields = accelerated(MixtralConfigTiny(), adapters=False, dtype=dtype)
    logits = torch.randn(8, 2, 50, dtype=dtype).requires_grad_()
    labels = torch.randint(50, (8, 2))
    with one_of(Topology(world_size=1), 0):
        group = parallel_state.get_tensor_model_parallel_group()
        fused_vocab_parallel_cross_entropy(logits.clone(), labels, group).sum().backward()
    assert logits.grad is not None
    rounded = bool((logits.grad.bfloat16() == logits.grad).all())
    assert rounded
    assert fields["cross_entropy_loss_fusion"] is (dtype is torch.bfloat16)
