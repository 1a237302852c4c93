"""Learning rates of NeMo's schedules, step by step, from Megatron's scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import mixtral_recipes as llm
from mixtral_recipes.errors import RecipeError

PEAK = 1.0


def rates(schedule: Any, steps: int) -> list[float]:
    """The learning rate of every step."""
    group = {"lr": 0.0, "weight_decay": 0.0, "max_lr": PEAK, "min_lr": schedule.min_lr}
    optimizer: Any = SimpleNamespace(param_groups=[group])
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=PEAK, min_lr=schedule.min_lr, start_wd=0.0, end_wd=0.0, wd_incr_steps=1,
        wd_incr_style="constant", **schedule.megatron(schedule.max_steps or steps),
    )  # fmt: skip
    found = []
    for _ in range(steps):
        scheduler.step(1)
        found.append(group["lr"])
    return found


def test_warmup_then_constant() -> None:
    assert rates(llm.WarmupPolicyScheduler(2), 5) == pytest.approx([0.5, 1, 1, 1, 1])
    assert rates(llm.WarmupPolicyScheduler(warmup_ratio=0.4), 5) == pytest.approx([0.5, 1, 1, 1, 1])
    assert rates(llm.WarmupHoldPolicyScheduler(2), 5) == pytest.approx([0.5, 1, 1, 1, 1])


def test_warmup_then_linear_decay() -> None:
    assert rates(llm.WarmupAnnealingScheduler(2), 6) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25, 0])


def test_warmup_plateau_decay() -> None:
    schedule = llm.WarmupHoldAnnealScheduler(warmup_ratio=0.25, hold_ratio=0.25)
    assert rates(schedule, 8) == pytest.approx([0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    schedule = llm.WarmupHoldAnnealScheduler(hold_ratio=0.5, decay_schedule="one_minus_square_root")
    assert rates(schedule, 8)[3:] == pytest.approx([1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0])


def test_a_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="decay_schedule='cubic' is not supported"):
        llm.WarmupHoldAnnealScheduler(decay_schedule="cubic").megatron(10)
    with pytest.raises(RecipeError, match="leave some of it for the decay"):
        llm.WarmupHoldAnnealScheduler(warmup_ratio=0.5, hold_ratio=0.5).megatron(10)
