"""What is known about this machine and its processes."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mixtral_recipes.system import machine
from mixtral_recipes.system.machine import children, cores, io_threads, package_version, process_start


def test_devices_are_counted_where_there_is_no_management_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(machine.nvml, "names", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (machine.gpu_count(), machine.gpu_name()) == (2, None)


def test_a_machine_without_gpus_has_none_whatever_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(machine.nvml, "names", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert machine.gpu_count() == 0


def test_threads_follow_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert (cores(), io_threads(), io_threads(4), io_threads(64)) == (8, 10, 4, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    assert io_threads() == 16


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_container_has_the_time_of_fewer_cores(
    files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "Path", lambda root, name: tmp_path / name)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cores() == count


def test_versions_of_packages() -> None:
    assert package_version("torch") == metadata.version("torch")
    assert package_version("no-such-package") is None


def test_a_process_is_known_by_its_start_until_it_ends() -> None:
    started = process_start(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in children(os.getpid())
        assert int(process_start(child.pid)) > int(started)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_start(child.pid) == ""  # a zombie, not waited for yet
        child.wait()
        assert process_start(child.pid) == ""
    assert child.pid not in children(os.getpid())
