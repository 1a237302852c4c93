"""How fast a run is, in the unit papers use: floating-point operations the model needs, per second and process.

Shape suffixes as everywhere: h hidden, s sequence.
"""

import functools
import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mixtral_recipes.layout import cards, operations
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.models.config import MixtralConfig

# The first steps of a process: kernels are compiled and chosen, memory is reserved. An H200 took 20 to 35 s for one.
_WARMUP_STEPS = 3


class Spent(NamedTuple):
    """What a step did, and where its time went; or several steps together.

    Attributes:
        tokens: Real ones, of all processes.
        flops: Operations the model needs for them, of all processes.
        seconds: On the clock.
        data_wait: Of these, until the batches were there.
        host_wait: Of these, at the end, until the device (and other ranks) had done what the host had asked of it.
            Close to zero on a GPU, it is the GPU that waits for the host.
    """

    tokens: float = 0
    flops: float = 0.0
    seconds: float = 0.0
    data_wait: float = 0.0
    host_wait: float = 0.0

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass
class Speed:
    """One process's steps, those it warms up in apart.

    Attributes:
        warmup: Each step until it is warm.
        warm_steps: Steps since.
        warm: What they did.
    """

    warmup: list[Spent] = field(default_factory=list)
    warm_steps: int = 0
    warm: Spent = field(default_factory=Spent)

    def add(self, step: Spent) -> None:
        """Count one more step."""
        if len(self.warmup) < _WARMUP_STEPS:
            self.warmup.append(step)
        else:
            self.warm_steps += 1
            self.warm = self.warm.plus(step)

    @property
    def all(self) -> Spent:
        """All steps."""
        return functools.reduce(Spent.plus, self.warmup, self.warm)

    @property
    def steady(self) -> Spent:
        """The steps since it is warm; all while it is not."""
        return self.warm if self.warm_steps else self.all

    @property
    def seconds_per_step(self) -> float:
        """What the next step will take."""
        if self.warm_steps:
            return self.warm.seconds / self.warm_steps
        return self.warmup[-1].seconds if self.warmup else 0.0

    def result(self, world_size: int, peak: float | None) -> dict[str, float | None]:
        """What a run's result says of it; None before the first step, and for what is not known.

        Args:
            world_size: Processes.
            peak: Of one's device, in 1e12 operations per second.
        """
        steady, everything = self.steady, self.all
        seconds = steady.seconds or math.nan
        tflops = steady.flops / seconds / world_size / 1e12
        found = {
            "tokens_per_second": steady.tokens / seconds,
            "tokens_per_second_with_warmup": everything.tokens / (everything.seconds or math.nan),
            "tflops_per_process": tflops,
            "share_of_peak": tflops / (peak or math.nan),
            "data_wait_share": steady.data_wait / seconds,
            "host_wait_share": steady.host_wait / seconds,
        }
        known = {name: None if math.isnan(value) else value for name, value in found.items()}
        return known | {"train_seconds": round(everything.seconds, 2)}


def flops_per_token(config: MixtralConfig, sequence_length: float, *, adapters_only: bool = False) -> float:
    """`operations.flops_per_token` of a model's configuration."""
    shape = ModelShape.of(config)
    return operations.flops_per_token(shape, sequence_length, topk=config.moe_router_topk, adapters_only=adapters_only)


def peak_tflops(device: torch.device, *, fp8: bool) -> float | None:
    """The peak of a device in 1e12 operations per second, where it is known."""
    name = cards.named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if name is None:
        return None
    card = cards.card(name)
    return card.fp8_tflops if fp8 else card.bf16_tflops


def memory(device: torch.device) -> dict[str, float]:
    """Memory this process takes, in 1e9 bytes.

    Returns:
        ``memory_gb``: on a GPU the most that tensors took since the start, else what is resident now. On a GPU also
        ``memory_reserved_gb``, the most that torch took from the driver for them, and ``memory_card_gb``, what the
        driver says is taken of the card now, by libraries, kernels and other processes too.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
            "memory_card_gb": (total - free) / 1e9,
        }
    with open("/proc/self/statm") as file:
        return {"memory_gb": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9}
