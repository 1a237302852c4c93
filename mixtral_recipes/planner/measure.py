"""How fast this machine's processor is: `plan --calibrate`. The one file beside `simulate` that loads torch."""

import time
from collections.abc import Callable

import torch

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.layout import cards
from mixtral_recipes.planner.speed import STREAM

_SECONDS = 8.0  # of each measurement: long enough for clocks and heat to settle


def this_machine() -> tuple[str, dict[str, float]]:
    """Measure products, memory bandwidth and launches of the GPU, or of the CPU where there is none.

    Returns:
        The card's name, and the fields of its `Card` that were measured.

    Raises:
        EnvironmentProblem: a GPU that is in no table.
    """
    if not torch.cuda.is_available():
        return "cpu", _cpu()
    name = cards.named(torch.cuda.get_device_name())
    if name is None:
        raise EnvironmentProblem(
            f"{torch.cuda.get_device_name()} is not one of the planner's cards: {', '.join(cards.CARDS)}."
        )
    return name, _gpu(cards.card(name))


def _cpu() -> dict[str, float]:
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    block = torch.zeros(64 << 20)
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    reached = 2 * size**3 / _each(lambda: torch.mm(a, b)) / 1e12
    moved = 2 * block.nbytes / _each(lambda: block.add_(1.0)) / 1e12
    one = torch.zeros(1)
    return {
        "bf16_tflops": reached,  # what it calculates in: fp32
        "product_share": 1.0,
        "memory_tbps": moved / STREAM,
        "link_gbps": moved * 1000 / 4,  # processes exchange through memory: written, read, written, read
        "memory_gb": kilobytes * 1024 / 1e9,
        "launch_us": _each(lambda: one.add_(1.0)) * 1e6,
    }


def _gpu(card: cards.Card) -> dict[str, float]:
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    block = torch.zeros(512 << 20, device="cuda", dtype=torch.bfloat16)
    work = 2 * size**3 / 1e12
    found = {
        "product_share": work / _each(lambda: torch.mm(a, b)) / card.bf16_tflops,
        "memory_tbps": 2 * block.nbytes / _each(lambda: block.add_(1.0)) / 1e12 / STREAM,
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
    }
    one = torch.zeros(1, device="cuda")
    started = time.perf_counter()
    for _ in range(20_000):
        one.add_(1.0)
    found["launch_us"] = (time.perf_counter() - started) / 20_000 * 1e6
    torch.cuda.synchronize()
    return found


def _each(work: Callable[[], object]) -> float:
    """Seconds of one call, over as many as take `_SECONDS`."""
    gpu = torch.cuda.is_available()
    work()
    calls, started = 0, time.perf_counter()
    while True:
        for _ in range(10):
            work()
        calls += 10
        if gpu:
            torch.cuda.synchronize()
        passed = time.perf_counter() - started
        if passed > _SECONDS:
            return passed / calls
