"""How fast a run is, and how much of its device it uses."""

import pytest
import torch

from mixtral_recipes.models.config import MixtralConfig8x7B, MixtralConfigTiny
from mixtral_recipes.training.watch.throughput import Speed, flops_per_token, memory_gb, peak_tflops


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


def test_speed_is_that_of_warm_steps() -> None:
    speed = Speed()
    assert (speed.steady, speed.overall, speed.seconds_per_step) == (None, None, 0.0)
    speed.add(100, 20.0)
    assert (speed.steady, speed.overall, speed.seconds_per_step) == (5.0, 5.0, 20.0)
    for seconds in (2.0, 2.0, 0.5, 1.5):
        speed.add(100, seconds)
    assert (speed.steady, speed.overall) == (100.0, 500 / 26)
    assert (speed.seconds_per_step, speed.seconds) == (1.0, 26.0)
