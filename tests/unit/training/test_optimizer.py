"""The learning rate of every step, against the formulas."""

import math

import pytest
import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from mixtral_recipes.training.optimizer import build_scheduler, norm_of_all

LR, MIN_LR = 1e-3, 1e-5


def rates(schedule: CosineAnnealingScheduler | None, steps: int) -> list[float]:
    """The learning rate of each step of a run."""
    optim = MegatronOptimizerModule(OptimizerConfig(lr=LR), schedule)
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weights], "max_lr": LR, "min_lr": schedule.min_lr if schedule else LR}])
    scheduler = build_scheduler(optim, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


def cosine(step: int, warmup: int, decay: int) -> float:
    """Linear warmup from 0, then half a cosine from LR to MIN_LR, then MIN_LR."""
    if step < warmup:
        return LR * step / warmup
    done = min(1.0, (step - warmup) / (decay - warmup))
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize(
    ("warmup", "constant", "steps", "effective_warmup"),
    [
        (10, 0, 100, 10),
        (0, 0, 50, 0),
        (10, 20, 100, 10),
        pytest.param(50, 0, 20, 2, id="a warmup longer than the run takes a tenth of it"),
        pytest.param(20, 0, 20, 2, id="a warmup as long as the run takes a tenth of it"),
        pytest.param(19, 0, 20, 19, id="a warmup shorter than the run is kept"),
    ],
)
def test_warmup_then_a_cosine(warmup: int, constant: int, steps: int, effective_warmup: int) -> None:
    found = rates(CosineAnnealingScheduler(warmup_steps=warmup, constant_steps=constant, min_lr=MIN_LR), steps)
    expected = [cosine(step, effective_warmup, steps - constant) for step in range(steps)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_without_a_schedule_the_learning_rate_is_constant() -> None:
    assert rates(None, 20) == [LR] * 20


def test_a_schedule_without_a_step_to_decay_over_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"constant_steps=20 leaves none of trainer\.max_steps=20"):
        rates(CosineAnnealingScheduler(constant_steps=20), 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_all_gradients_is_megatrons(dtype: torch.dtype) -> None:
    from megatron.core.utils import local_multi_tensor_applier

    gradients = [torch.randn(rows, 33).to(dtype) for rows in range(1, 40)]
    found, _ = local_multi_tensor_applier(norm_of_all, torch.zeros(1), [gradients], False)
    expected = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert (found.shape, found.dtype) == ((1,), torch.float32)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    if dtype == torch.float32:  # to the bit, as its function adds them up
        assert torch.equal(found, torch.norm(torch.tensor([[torch.norm(g) for g in gradients]])).view(1))
