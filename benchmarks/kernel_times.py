"""Where a GPU's time in one step goes: which kernels, and how long none runs. Reads torch.profiler's trace."""

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

KINDS = ("matrix products", "attention", "copies", "other")
# In this order, since attention's kernels are CUTLASS's too: by the names that cuDNN, FlashAttention, cuBLAS (nvjet,
# xmma, gemv), CUTLASS, Triton's templates and torch give their kernels.
_BY_NAME = (
    ("attention", r"sdpa|flash|fmha|fused_attn|compute_dot_do_o|convert_dq|attention|scaled_\w*masked_softmax|\bthd_"),
    ("matrix products", r"gemm|nvjet|cutlass|gemv|cublas|splitk|triton_(tem_\w*)?mm|\bdot_kernel"),
    ("copies", r"memcpy|memset|copy_kernel|catarray|fillfunctor"),
)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    """What a kernel, or a copy that the driver does, is for: one of `KINDS`."""
    return next((kind for kind, pattern in _BY_NAME if re.search(pattern, name, re.IGNORECASE)), "other")


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The time covered by (start, end) intervals, counted once where streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def shares(trace: list[dict[str, Any]], *, profiled: float, steady: float, longest: int = 12) -> dict[str, Any]:
    """What a trace of one step says.

    Args:
        trace: ``traceEvents`` of torch.profiler's file; times in microseconds.
        profiled: Seconds of the traced step.
        steady: Seconds of a step without a profiler, which launches faster.
        longest: How many kernels are named.

    Returns:
        ``share_of_gpu_time`` by kind; ``idle``, the share of a steady step in which nothing runs on the GPU, and
        ``idle_profiled``, of the traced one; ``kernels``, how many; ``longest``, their share of the GPU's time by name.

    Raises:
        ValueError: nothing ran on a GPU.
    """
    events = [event for event in trace if event.get("cat") in _ON_GPU and event.get("ph", "X") == "X"]
    if not events:
        raise ValueError("the trace has no kernels")
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event["name"]] += event["dur"]
    total = sum(by_name.values())
    by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, duration in by_name.items():
        by_kind[kind_of(name)] += duration
    busy = union((event["ts"], event["ts"] + event["dur"]) for event in events) / 1e6
    return {
        "share_of_gpu_time": {kind: round(duration / total, 4) for kind, duration in by_kind.items()},
        "idle": round(max(1 - busy / steady, 0.0), 4),
        "idle_profiled": round(max(1 - busy / profiled, 0.0), 4),
        "kernels": len(events),
        "longest": {name[:120]: round(duration / total, 4) for name, duration in by_name.most_common(longest)},
    }


def profile(step: Callable[[], Any], *, steady: float) -> dict[str, Any]:
    """`shares` of one step on the current GPU; ``steady`` is what a step takes without a profiler, in seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        profiled = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return shares(json.loads(file.read_text())["traceEvents"], profiled=profiled, steady=steady)
