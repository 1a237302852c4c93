"""What a run ran on, for its report."""

import platform

import torch

from mixtral_recipes.system.machine import cores, package_version

_PACKAGES = ("mixtral-recipes", "torch", "megatron-core", "transformer-engine", "transformers", "nemo-run", "numpy")


def describe_environment(device: torch.device) -> dict[str, str]:
    """Name -> value: machine, device and the versions of what computes."""
    found = {
        "machine": f"{platform.node()}, {platform.machine()}, {cores()} CPU core(s)",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found | {name: version for name in _PACKAGES if (version := package_version(name))}
