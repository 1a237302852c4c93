"""What the driver's management library is asked for; a stand-in answers as its header says."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from mixtral_recipes.system import machine, nvml


class Library:
    """libnvidia-ml: every function returns 0 if it went well."""

    def __init__(self, names: list[str], *, start: int = 0) -> None:
        self.names = names
        self.start = start
        self.shut_down = False

    def nvmlInit_v2(self) -> int:
        return self.start

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.names)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        device._obj.value = 1000 + index.value
        return 0

    def nvmlDeviceGetName(self, device: Any, text: Any, size: Any) -> int:
        assert len(text) == size.value
        text.value = self.names[device.value - 1000].encode()
        return 0

    def nvmlShutdown(self) -> int:
        self.shut_down = True
        return 0


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml.names.cache_clear()
    yield
    nvml.names.cache_clear()


def loaded(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    monkeypatch.setattr(ctypes, "CDLL", {"libnvidia-ml.so.1": library}.__getitem__)
    return library


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,1", 2), ("3", 1), ("GPU-8f2c,GPU-91d0", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)],
)
def test_cuda_visible_devices_hides_gpus(visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = loaded(monkeypatch, Library(["NVIDIA H100 80GB HBM3"] * 3 + ["NVIDIA H200"]))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (machine.gpu_count(), machine.gpu_name()) == (count, "NVIDIA H100 80GB HBM3")
    assert library.shut_down


def test_a_container_without_gpus_has_none_whatever_its_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, Library([]))
    assert (machine.gpu_count(), machine.gpu_name()) == (0, None)


def test_a_driver_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, Library(["NVIDIA H200"], start=9))
    assert nvml.names() is None
