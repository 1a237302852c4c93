"""What a training step on one GPU reads and writes, operator by operator, and how long the host takes to ask for it.

    python benchmarks/gpu_traffic.py                                     LoRA in bf16 at 8x7B's widths, 4 layers
    python benchmarks/gpu_traffic.py --mode qlora --sequence 16384 --recompute full
    .venv-te/bin/python -m tests.card --idle benchmarks/gpu_traffic.py   where there is no GPU: over a card that
                                                                         computes nothing

Bytes are those of the tensors that each operator is given and returns, each counted once, also where it is updated in
place; views are left out. Triton's kernels are seen where they are operators of torch's. Of what torch compiles the
backward pass is not seen, and the forward pass runs uncompiled while it is counted. All sums are per layer and
microbatch.

Prints JSON on the last line of stdout. Without a GPU it says so and ends well, unless asked for ``--size tiny``.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gpu_contenders import FP8, SIZES, Bench
from gpu_step import WARMUP, say, synchronize
from step_contenders import Step
from temporary import temporary_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_recipes.errors import MixtralRecipesError

_MADE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")  # nothing is read or written


def tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in an operator's arguments or result; Transformer Engine's FP8 tensors are several."""
    if type(value) in (Tensor, torch.nn.Parameter):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "get_metadata"):
        yield from tensors(value.get_metadata())


class Traffic(TorchDispatchMode):
    """Counts what torch's operators touch on a device, and Transformer Engine's functions with them.

    Attributes:
        calls: By operator.
        moved: Bytes, by operator.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.inside = device, 0
        self.calls, self.moved = Counter[str](), Counter[str]()

    def note(self, name: str, given: Any, result: Any) -> None:
        """Count one call."""
        touched = {
            (each.data_ptr(), each.numel()): each.numel() * each.element_size()
            for each in tensors([given, result])
            if each.device.type == self.device.type
        }
        self.calls[name] += 1
        self.moved[name] += sum(touched.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not (view or self.inside or str(func).startswith(_MADE)):
            self.note(str(func), (args, kwargs or {}), result)
        return result

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is counted as one operator."""

        def counted(*args: Any, **named: Any) -> Any:
            self.inside += 1
            try:
                result = function(*args, **named)
            finally:
                self.inside -= 1
            self.note(name, (args, named), result)
            return result

        return counted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done inside."""
        kernels: ModuleType | None = sys.modules.get("transformer_engine_torch")
        theirs = {
            name: value
            for name, value in vars(kernels or object).items()
            if callable(value) and not isinstance(value, type) and not name.startswith("_")
        }
        for name, function in theirs.items():
            setattr(kernels, name, self.around(f"te.{name}", function))
        try:
            with self:
                yield
        finally:
            for name, function in theirs.items():
                setattr(kernels, name, function)


def host_seconds(step: Step, device: torch.device) -> float:
    """How long a step keeps the host, the card's work included where the host waits for it."""
    synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, device: torch.device, scratch: Path) -> dict[str, Any]:
    """One mode's step."""
    bench = Bench(options, options.mode, device, scratch)
    each = bench.layers * options.microbatches
    step = bench.ours(bench.precisions[0], options.recompute[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP):
        step()
    seconds = [host_seconds(step, device) for _ in range(options.steps)]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    traffic = Traffic(device)
    with traffic.counting():
        step()
    return {
        "layers": bench.layers,
        "sequence": bench.sequence,
        "host_ms": round(min(seconds) / each * 1e3, 3),
        "memory_gb_torch": round(peak, 2),
        "mb": round(sum(traffic.moved.values()) / each / 1e6, 3),
        "operators": [
            {"name": name, "calls": round(traffic.calls[name] / each, 3), "mb": round(moved / each / 1e6, 3)}
            for name, moved in traffic.moved.most_common(options.operators)
        ],
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8x7b")
    parser.add_argument("--mode", choices=("lora", "lora-attention", "qlora", "full"), default="lora")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8", *FP8))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=4, help="in a step")
    parser.add_argument("--recompute", default="none", metavar="WHAT", help="as gpu_step.py's")
    parser.add_argument("--steps", type=int, default=4, help="whose least host time counts")
    parser.add_argument("--operators", type=int, default=40, metavar="N", help="told of: those that move most")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="PATH=VALUE", help="of the recipe")
    options = parser.parse_args()
    options.precisions = [options.precision or SIZES[options.size].precisions[0]]
    options.recompute, options.same_weights = [options.recompute], None
    return options


def main() -> int:
    """Measure; 2 if a setting is wrong."""
    options = arguments()
    if not torch.cuda.is_available() and options.size != "tiny":
        say("gpu_traffic.py measures a GPU, and this machine has none; --size tiny runs on a CPU.")
        print(json.dumps({"skipped": "no GPU"}))
        return 0
    warnings.filterwarnings("ignore")
    from mixtral_recipes.training import distributed

    device = distributed.choose_device("auto", distributed.ProcessPlace.from_environment())
    with temporary_folder() as scratch:
        try:
            result = measure(options, device, scratch)
        except MixtralRecipesError as error:
            say(f"error: {error}")
            return 2
    print(json.dumps({"asked": vars(options)} | result), flush=True)
    distributed.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
