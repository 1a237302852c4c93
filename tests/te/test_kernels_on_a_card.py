"""What is asked of a card: which kernels are made, what FP8 writes, what a step moves (`tests/card`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.card.build import environment

TRAFFIC = Path(__file__).parents[2] / "benchmarks/gpu_traffic.py"
ONE_KERNEL = """
import torch
from torch._inductor import metrics
from mixtral_recipes.models.compiled import compile_for_memory
from megatron.core.fusions import fused_bias_swiglu

compile_for_memory()
for rows, dtype in ((64, torch.bfloat16), (48, torch.bfloat16), (64, torch.float32)):
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(rows, 1, device="cuda", dtype=dtype, requires_grad=True)
    out = fused_bias_swiglu.weighted_bias_swiglu_impl(x, None, probs)
    metrics.reset()
    out.backward(torch.ones_like(out))
    print(metrics.generated_kernel_count)
"""
BY_ROW_ONLY = """
import torch, transformer_engine.pytorch as te, transformer_engine_torch as tex
from transformer_engine.common import recipe as recipes
from mixtral_recipes.models.weight_gradients import prepare_none_of_frozen_experts

def gradient(recipe, trained):
    torch.manual_seed(1)
    layer = te.GroupedLinear(2, 128, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with te.autocast(enabled=True, recipe=recipe()):
        out = layer.requires_grad_(trained)(x, [96, 160])
    quantize, by_column = tex.split_quantize, []
    def noted(*given, **named):
        found = quantize(*given, **named)
        by_column.extend(each.get_usages()["columnwise"] for each in found)
        return found
    tex.split_quantize = noted
    out.backward(torch.randn_like(out))
    tex.split_quantize = quantize
    return x.grad, by_column

RECIPES = [getattr(recipes, name) for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")]
expected = [gradient(recipe, False)[0] for recipe in RECIPES]
prepare_none_of_frozen_experts()
for recipe, before in zip(RECIPES, expected):
    found, by_column = gradient(recipe, False)
    assert torch.equal(found, before), recipe
    assert by_column == [False, False], (recipe, by_column)
    assert gradient(recipe, True)[1] == [True, True], recipe
"""
LOSSES = """
import torch
from transformer_engine.pytorch.triton import cross_entropy as of_te

torch.manual_seed(1)
logits = (4 * torch.randn(6, 2, 1000)).bfloat16()
logits[..., 990:] = torch.finfo(torch.bfloat16).min  # as padded rows of a vocabulary
labels, weights = torch.randint(0, 990, (6, 2)), torch.rand(6, 2)
wide = logits.float().requires_grad_()
expected = torch.nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(6, 2)
(expected * weights).sum().backward()
losses, *kept = of_te.cross_entropy_forward(logits, labels, 0.0, False, None, -100, False)
saved, stats, target, number, rank, ranks = kept
found = of_te.cross_entropy_backward(saved, stats, target, number, weights, 0.0, False, rank, ranks, -100)
torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
assert found.dtype is torch.bfloat16
torch.testing.assert_close(found.float(), wide.grad, rtol=2**-7, atol=1e-7)  # rounded once, by the interpreter down
"""
# Of a step of two layers at 8x7B's widths and 4096 tokens: MB moved per layer, and the peak in GB. Measured, and 1 %.
MOVED = {
    "lora bf16": (15_980, 9.48),
    "lora fp8": (16_950, 9.48),  # a weight in FP8 is two tensors, and both count
    "qlora bf16": (15_350, 5.03),
}


def printed(variables: dict[str, str], *words: str | Path) -> str:
    """What Python prints, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        env=own | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_gradient_of_the_gated_activation_is_one_kernel(card: Path) -> None:
    """Compiled for one size, for any, and for probabilities in fp32."""
    compiled = {"TORCH_COMPILE_DISABLE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    assert printed(environment(card) | compiled, "-c", ONE_KERNEL).split() == ["1", "1", "1"]


def test_frozen_experts_gradients_are_quantised_by_row_only(card: Path) -> None:
    printed(environment(card) | {"TORCH_COMPILE_DISABLE": "1"}, "-c", BY_ROW_ONLY)


def test_losses_of_the_vocabulary_are_rounded_once() -> None:
    """Transformer Engine's own Triton kernels, interpreted on the CPU."""
    printed({"TRITON_INTERPRET": "1"}, "-c", LOSSES)


@pytest.mark.parametrize("case", MOVED)
def test_a_step_moves_no_more_than_it_did(case: str, card: Path) -> None:
    """Nothing is computed: sizes of tensors are added up."""
    mode, precision = case.split()
    words = f"--mode {mode} --precision {precision} --layers 2 --microbatches 1 --steps 1".split()
    found = json.loads(printed(environment(card, idle=True), TRAFFIC, *words).splitlines()[-1])
    moved, peak = MOVED[case]
    assert 0.9 * moved < found["mb"] <= moved, found
    assert 0.9 * peak < found["memory_gb_torch"] <= peak, found
