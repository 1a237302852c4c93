"""What a run ran on, for its report."""

import os
import platform
from importlib import metadata

import torch

_PACKAGES = ("mixtral-recipes", "torch", "megatron-core", "transformer-engine", "transformers", "nemo-run", "numpy")


def describe_environment(device: torch.device) -> dict[str, str]:
    """Name -> value: machine, device and the versions of what computes."""
    found = {
        "machine": f"{platform.node()}, {platform.machine()}, {len(os.sched_getaffinity(0))} CPU core(s)",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found | {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
