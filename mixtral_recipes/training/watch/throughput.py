"""How fast a run is, in the unit papers use: floating-point operations the model needs, per second and process.

Shape suffixes as everywhere: h hidden, s sequence.
"""

import os
from dataclasses import dataclass, field

import torch

from mixtral_recipes.layout import operations
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.models.config import MixtralConfig

# Dense peak of one GPU in 1e12 operations per second, bf16. Source: NVIDIA's datasheets (SXM).
_PEAK_BF16 = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "GB200": 2500.0}


# The first steps of a process: kernels are compiled and chosen, memory is reserved. An H200 took 20 to 35 s for one.
_WARMUP_STEPS = 3


@dataclass
class Speed:
    """Real tokens per second of one process's steps, those it warms up in apart.

    Attributes:
        warmup: Tokens and seconds of each step until it is warm.
        warm_steps: Steps since.
        warm_tokens: Their tokens.
        warm_seconds: Their seconds.
    """

    warmup: list[tuple[int, float]] = field(default_factory=list)
    warm_steps: int = 0
    warm_tokens: int = 0
    warm_seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one more step."""
        if len(self.warmup) < _WARMUP_STEPS:
            self.warmup.append((tokens, seconds))
        else:
            self.warm_steps += 1
            self.warm_tokens += tokens
            self.warm_seconds += seconds

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.warm_seconds + sum(seconds for _, seconds in self.warmup)

    @property
    def overall(self) -> float | None:
        """Tokens per second of all steps; None before the first."""
        tokens = self.warm_tokens + sum(tokens for tokens, _ in self.warmup)
        return tokens / self.seconds if self.seconds else None

    @property
    def steady(self) -> float | None:
        """Tokens per second since it is warm; of all steps while it is not."""
        return self.warm_tokens / self.warm_seconds if self.warm_seconds else self.overall

    @property
    def seconds_per_step(self) -> float:
        """What the next step will take."""
        if self.warm_steps:
            return self.warm_seconds / self.warm_steps
        return self.warmup[-1][1] if self.warmup else 0.0


def flops_per_token(config: MixtralConfig, sequence_length: float, *, adapters_only: bool = False) -> float:
    """`operations.flops_per_token` of a model's configuration."""
    shape = ModelShape.of(config)
    return operations.flops_per_token(shape, sequence_length, topk=config.moe_router_topk, adapters_only=adapters_only)


def peak_tflops(device: torch.device, *, fp8: bool) -> float | None:
    """The peak of a device in 1e12 operations per second, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model in sorted(_PEAK_BF16, key=len, reverse=True):
        if model in name:
            return _PEAK_BF16[model] * (2 if fp8 else 1)
    return None


def memory_gb(device: torch.device) -> float:
    """Memory this process takes, in 1e9 bytes: the GPU's peak since the start, or what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
