"""What this machine has, found out without importing torch. The job itself asks CUDA."""

import os
from pathlib import Path


def gpu_count() -> int:
    """NVIDIA GPUs a process started here could use: those the driver lists, less what CUDA_VISIBLE_DEVICES hides."""
    try:
        listed = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        listed = 0
    listed = listed or len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not listed:
        return listed
    return min(listed, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))
