"""What this machine has and runs, found out without importing torch. The job itself asks CUDA."""

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from mixtral_recipes.system import nvml

COMPILER = "install a C compiler and Python's headers, on Debian and Ubuntu: apt install gcc python3-dev"


def at_a_prompt() -> bool:
    """Whether this process runs what is typed, in a notebook or after ``>>>``, rather than a script."""
    return not hasattr(sys.modules["__main__"], "__file__")


def gpu_count() -> int:
    """NVIDIA GPUs a process started here could use: those the driver lists, less what CUDA_VISIBLE_DEVICES hides."""
    found = nvml.names()
    if found is None:  # a container may have GPUs and no management library
        listed = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    else:
        listed = len(found)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not listed:
        return listed
    return min(listed, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def gpu_name() -> str | None:
    """What the driver calls the first GPU, or None."""
    return (nvml.names() or ("",))[0] or None


def no_compiler() -> str | None:
    """What Triton and torch.compile lack here to build the callers of their kernels; None if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no gcc or clang on PATH"
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return None if headers.exists() else f"no {headers}"


def cores() -> int:
    """CPU cores this process can keep busy: those it may run on, and as many as its container gets the time of."""
    return min(len(os.sched_getaffinity(0)), _time_of_cores())


def _time_of_cores() -> int:
    """A control group's share of time (``docker --cpus``, Kubernetes' limits) in whole cores, counted up."""
    files = [("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")]  # version 2 and 1
    for names in files:
        with contextlib.suppress(OSError, ValueError):  # the other version; "max": no limit
            quota, period = map(int, " ".join(Path("/sys/fs/cgroup", name).read_text() for name in names).split())
            if quota > 0:
                return -(-quota // period)
    return sys.maxsize


def available_memory() -> int | None:
    """Bytes a process could take without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def io_threads(processes: int = 1) -> int:
    """Threads for reading, hashing and writing files: two more than the cores, so that some wait for the disk.

    Args:
        processes: How many share this machine's cores.
    """
    return min(16, cores() // processes + 2)


def package_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot, or an empty string if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def children(pid: int) -> list[int]:
    """Processes started by ``pid`` itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found
