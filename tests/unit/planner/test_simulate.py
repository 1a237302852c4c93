"""The formula against one rank's real model, built of fake tensors and run: every category of memory."""

import dataclasses
from typing import Any

import pytest

from mixtral_recipes.layout import cards
from mixtral_recipes.planner import simulate
from mixtral_recipes.planner.workload import LINEARS, Adapters, Recompute
from mixtral_recipes.recipes.outline import Question, job_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUICK: dict[str, tuple[Question, dict[str, Any]]] = {
    "pretraining, interleaved": (Question("mixtral_8x7b", "pretrain"), {}),
    "tiny LoRA": (Question("mixtral_tiny"), {}),
    "tiny LoRA on attention": (Question("mixtral_tiny"), {"adapters": Adapters(8, LINEARS[:2])}),
    "tiny LoRA on experts": (Question("mixtral_tiny"), {"adapters": Adapters(8, LINEARS[2:])}),
}
ALL: dict[str, tuple[Question, dict[str, Any]]] = {
    "LoRA": (Question("mixtral_8x7b"), {}),
    "LoRA on attention, micro batch 2": (Question("mixtral_8x3b"), {"adapters": Adapters(32, LINEARS[:2])}),
    "full": (Question("mixtral_8x7b", peft_scheme="none"), {}),
    "16k, tensor and context parallel": (Question("mixtral_8x7b_16k", "pretrain"), {}),
    "8x22b LoRA": (Question("mixtral_8x22b"), {}),
    "8x22b 64k, recomputed": (Question("mixtral_8x22b_64k", "pretrain"), {}),
    "performance mode": (Question("mixtral_8x7b", "pretrain", performance_mode=True), {}),
    "DoRA": (Question("mixtral_8x3b", peft_scheme="dora"), {}),
    "activations recomputed": (
        Question("mixtral_8x3b", peft_scheme="none"),
        {"recompute": Recompute("selective", modules=("moe_act", "layernorm"))},
    ),
    "first layers recomputed": (Question("mixtral_8x3b", "pretrain"), {"recompute": Recompute("full", "block", 8)}),
    "tiny full": (Question("mixtral_tiny", peft_scheme="none"), {}),
}


def check(asked: Question, changes: dict[str, Any]) -> None:
    job = dataclasses.replace(job_of(asked), **changes)
    for stage in simulate.compare(job, cards.card("h100")):
        rows = stage["memory_gb"]
        for name in ("weights", "gradients", "optimizer", "adapters"):
            assert rows[name]["formula"] == rows[name]["simulated"], (name, stage)
        assert rows["activations"]["formula"] == pytest.approx(rows["activations"]["simulated"], rel=0.03), stage


@pytest.mark.parametrize("case", QUICK)
def test_it_is_what_happens(case: str) -> None:
    check(*QUICK[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_it_is_what_happens_in_every_kind_of_recipe(case: str) -> None:
    check(*ALL[case])
