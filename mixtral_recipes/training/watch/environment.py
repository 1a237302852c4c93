"""What a run ran on, for its report."""

import platform

import torch

from mixtral_recipes.models.kernels import Kernels
from mixtral_recipes.system.machine import cores, package_version

_PACKAGES = ("mixtral-recipes", "torch", "megatron-core", "transformer-engine", "transformers", "nemo-run", "numpy")


def describe_environment(device: torch.device, computed_by: Kernels | None = None) -> dict[str, str]:
    """Name -> value: machine, device, its kernels and the versions of what computes."""
    found = {
        "machine": f"{platform.node()}, {platform.machine()}, {cores()} CPU core(s)",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    if computed_by is not None:
        found["kernels"] = str(computed_by)
    return found | {name: version for name in _PACKAGES if (version := package_version(name))}
