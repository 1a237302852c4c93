"""What a run says of itself before its first step."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_recipes.settings.optim import (
    CosineAnnealingScheduler,
    LRSchedule,
    MegatronOptimizerModule,
    WarmupPolicyScheduler,
)
from mixtral_recipes.training import prepare


@pytest.mark.parametrize(
    ("schedule", "steps", "said"),
    [
        (CosineAnnealingScheduler(warmup_steps=50), 20, "warmup_steps=50 does not end .*; it is shortened to 2"),
        (WarmupPolicyScheduler(warmup_steps=20), 20, "warmup_steps=20 does not end .*; it is shortened to 2"),
        (CosineAnnealingScheduler(warmup_steps=50), 51, None),
        (WarmupPolicyScheduler(warmup_ratio=0.5), 20, None),
    ],
)
def test_a_warmup_that_is_cut_is_told(schedule: LRSchedule, steps: int, said: str | None) -> None:
    parts: Any = SimpleNamespace(optim=MegatronOptimizerModule(lr_scheduler=schedule))
    lines: list[str] = []
    prepare._tell_of_warmup(parts, schedule.megatron(steps)["lr_warmup_steps"], lines.append)
    assert [bool(said and re.search(said, line)) for line in lines] == [True] * (said is not None)
