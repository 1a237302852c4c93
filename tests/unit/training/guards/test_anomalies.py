"""Steps that must not reach the weights, and losses that deserve a look."""

import math
import random
from typing import Any

import pytest
import torch

from mixtral_recipes.training.guards.anomalies import SpikeWatch, Update, checked_step, where_not_finite


class _Optimizer:
    """Steps as Megatron's chain does: norm, then update."""

    def __init__(self, norm: float, overflow: bool = False) -> None:
        self.norm, self.overflow, self.updates = norm, overflow, 0

    def get_grad_norm(self) -> float:
        return self.norm

    def step(self) -> tuple[bool, float | None, Any]:
        if self.overflow:
            return False, None, None
        norm = self.get_grad_norm()
        self.updates += 1
        return True, norm, None


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_nothing_is_updated_when_the_norm_is_not_finite(norm: float) -> None:
    optimizer = _Optimizer(norm)
    updated, found, _ = checked_step(optimizer)
    assert not updated
    assert not math.isfinite(found)
    assert optimizer.updates == 0
    optimizer.norm = 2.0
    assert checked_step(optimizer) == Update(True, 2.0)
    assert "get_grad_norm" not in vars(optimizer)


def test_the_norm_is_looked_at_once() -> None:
    """Each look at it on a GPU waits, after the step for the whole update."""
    looks = []

    class Norm:
        def __float__(self) -> float:
            looks.append(self)
            return 2.0

    assert checked_step(_Optimizer(Norm())) == Update(True, 2.0)  # pyright: ignore[reportArgumentType]
    assert len(looks) == 1


def test_loss_scaling_may_skip_a_step() -> None:
    assert checked_step(_Optimizer(math.nan, overflow=True)) == Update(False, 0.0)


def nothing() -> None:
    """A forward pass that goes well."""


def test_the_parameter_is_named() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.main_grad = torch.tensor([[1.0, math.inf], [0, 0]])  # pyright: ignore
    text = where_not_finite([model], [torch.tensor([1.0, 2, 2])], 0.5, math.inf, nothing)
    assert text == "the gradient norm is inf; not finite in weight on rank 0"
    text = where_not_finite([model], [torch.tensor([math.nan, 2, 2])], math.nan, math.nan, nothing)
    assert text == "the loss is nan on rank 0"


def test_of_several_gradients_the_one_nearest_the_loss_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in (model[0], model[1]):
        layer.weight.main_grad = torch.full((2, 2), math.nan)
    assert "not finite in 1.weight" in where_not_finite([model], [torch.ones(3)], 0.5, math.inf, nothing)


class _Poisoned(torch.nn.Linear):
    """A layer whose weights are finite and whose output is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(torch.nn.Linear(2, 2), ", whose weight is not finite"), (_Poisoned(2, 2), "")],
)
def test_the_layer_is_named_whose_output_is_the_first_that_is_not_finite(bad: torch.nn.Linear, reason: str) -> None:
    if reason:
        torch.nn.init.constant_(bad.weight, math.nan)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(bad, torch.nn.ReLU()), torch.nn.Linear(2, 2))
    text = where_not_finite(
        [model], [torch.tensor([math.nan, 2, 2])], math.nan, math.nan, lambda: model(torch.ones(1, 2))
    )
    assert text == f"the loss is nan on rank 0; the first non-finite values come from 1.0 on rank 0{reason}"
    assert not model[0]._forward_hooks


def test_spikes_stand_out_and_noise_does_not() -> None:
    draw, watch = random.Random(0), SpikeWatch()
    flagged = [step for step in range(200) if watch.is_spike((6.0 if step == 150 else 2.0) + draw.gauss(0, 0.1))]
    assert flagged == [150]
    falling = SpikeWatch()
    assert not any(falling.is_spike(10 * math.exp(-step / 30) + draw.gauss(0, 0.3)) for step in range(200))
