"""How fast a run is, and how much of its device it uses."""

import pytest
import torch

from mixtral_recipes.models.config import MixtralConfig8x7B, MixtralConfigTiny
from mixtral_recipes.training.watch.throughput import Speed, Spent, flops_per_token, memory, peak_tflops


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
        ("NVIDIA L40S", 362, 733),
    ],
)
def test_peaks_are_the_datasheets(monkeypatch: pytest.MonkeyPatch, name: str, bf16: float, fp8: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), fp8=False) == pytest.approx(bf16, rel=0.01)
    assert peak_tflops(torch.device("cuda"), fp8=True) == pytest.approx(fp8, rel=0.01)


def test_what_is_not_known_is_not_said() -> None:
    assert peak_tflops(torch.device("cpu"), fp8=False) is None
    assert 0.01 < memory(torch.device("cpu"))["memory_gb"] < 100
    assert flops_per_token(MixtralConfigTiny(), 100) > 0


def test_speed_is_that_of_warm_steps() -> None:
    speed = Speed()
    assert speed.seconds_per_step == 0.0
    assert set(speed.result(1, None).values()) == {None, 0.0}
    speed.add(Spent(100, 1e13, 20.0))
    first = speed.result(1, None)
    assert (first["tokens_per_second"], first["tokens_per_second_with_warmup"], speed.seconds_per_step) == (5, 5, 20)
    for seconds in (2.0, 2.0, 0.5, 1.5):
        speed.add(Spent(100, 1e13, seconds, data_wait=0.1, host_wait=0.3))
    assert speed.seconds_per_step == 1.0
    assert speed.result(world_size=2, peak=20.0) == pytest.approx(
        {
            "tokens_per_second": 100.0, "tokens_per_second_with_warmup": 500 / 26, "tflops_per_process": 5.0,
            "share_of_peak": 0.25, "data_wait_share": 0.1, "host_wait_share": 0.3, "train_seconds": 26.0,
        }
    )  # fmt: skip


def test_a_gpus_memory_is_what_torch_and_the_driver_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 140e9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 70e9)
    assert memory(torch.device("cuda")) == {"memory_gb": 50, "memory_reserved_gb": 70, "memory_card_gb": 80}
