"""Steps that must not reach the weights, spikes, and how fast a run is."""

import math
import random
from typing import Any

import pytest
import torch

from mixtral_recipes.models.config import MixtralConfig8x7B, MixtralConfigTiny
from mixtral_recipes.training.guards.anomalies import SpikeWatch, checked_step, where_not_finite
from mixtral_recipes.training.watch.throughput import flops_per_token, memory_gb, peak_tflops


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
    updated, found = checked_step(optimizer)
    assert not updated
    assert not math.isfinite(found)
    assert optimizer.updates == 0
    optimizer.norm = 2.0
    assert checked_step(optimizer) == (True, 2.0)
    assert "get_grad_norm" not in vars(optimizer)


def test_loss_scaling_may_skip_a_step() -> None:
    assert checked_step(_Optimizer(math.nan, overflow=True)) == (False, 0.0)


def test_the_parameter_is_named() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.main_grad = torch.tensor([[1.0, math.inf], [0, 0]])  # pyright: ignore
    text = where_not_finite([model], [torch.tensor([1.0, 2, 2])], 0.5, math.inf)
    assert text == "the gradient norm is inf; not finite in weight on rank 0"
    assert (
        where_not_finite([model], [torch.tensor([math.nan, 2, 2])], math.nan, math.nan) == "the loss is nan on rank 0"
    )


def test_spikes_stand_out_and_noise_does_not() -> None:
    draw, watch = random.Random(0), SpikeWatch()
    flagged = [step for step in range(200) if watch.is_spike((6.0 if step == 150 else 2.0) + draw.gauss(0, 0.1))]
    assert flagged == [150]
    falling = SpikeWatch()
    assert not any(falling.is_spike(10 * math.exp(-step / 30) + draw.gauss(0, 0.3)) for step in range(200))


def test_flops_are_six_per_active_parameter_and_token() -> None:
    config = MixtralConfig8x7B()
    # 12.88 B parameters are active, of which the embedding's 131 M only look up; attention comes on top.
    active = 12_879_925_248 - 32000 * 4096
    without_attention = flops_per_token(config, 0)
    assert without_attention == pytest.approx(6 * active, rel=1e-3)
    attention = flops_per_token(config, 4096) - without_attention
    assert attention == pytest.approx(3 * 32 * 2 * 4096 * 4096)
    assert flops_per_token(config, 4096, adapters_only=True) == pytest.approx(flops_per_token(config, 4096) * 2 / 3)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [  # dense, SXM. Source: NVIDIA's datasheets.
        ("NVIDIA H100 80GB HBM3", 989, 1978),
        ("NVIDIA H200", 989, 1978),
        ("NVIDIA B200", 2250, 4500),
    ],
)
def test_peaks_are_the_datasheets(monkeypatch: pytest.MonkeyPatch, name: str, bf16: float, fp8: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), fp8=False) == pytest.approx(bf16, rel=0.01)
    assert peak_tflops(torch.device("cuda"), fp8=True) == pytest.approx(fp8, rel=0.01)


def test_what_is_not_known_is_not_said() -> None:
    assert peak_tflops(torch.device("cpu"), fp8=False) is None
    assert 0.01 < memory_gb(torch.device("cpu")) < 100
    assert flops_per_token(MixtralConfigTiny(), 100) > 0
