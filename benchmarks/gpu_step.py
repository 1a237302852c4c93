"""Tokens per second of a training step on one GPU: ours beside transformers + peft, at 8x7B's widths.

    python benchmarks/gpu_step.py                                    LoRA on all linear layers, 4 layers, 4096 tokens
    python benchmarks/gpu_step.py --mode full --layers 3 --microbatches 16 --profile
    python benchmarks/gpu_step.py --layers 32 --contenders ours --recompute none moe_act,layernorm full:8
    python benchmarks/gpu_step.py --size tiny                        a few seconds, on a CPU too

Ours is what the recipe gives (`mixtral_8x7b.finetune_recipe`), in each precision and each way to recompute that is
asked for, changed by ``--set`` as on the command line: ``--set optim.config.lr=1e-4 model.config.accelerate=false``.
Theirs is transformers with each way it has to compute experts, sdpa attention and pure bf16: AdamW on bf16 weights,
where ours keeps fp32 ones, and no auxiliary loss, where ours computes the recipe's. Random full sequences, every token
learned; what cannot run is listed with its reason.

Each contender is first built and stepped alone, which gives its memory. If all fit into the card together, and half of
``--limit`` is left, they are then stepped in turn, so that a slow moment strikes all; otherwise, or with ``--apart``,
each counts as it was alone. ``measured`` in the result says which. Up to two layers both sides start from the same
weights and their first losses are compared; beyond, weights are random on either side (``--same-weights`` insists).

Prints JSON on the last line of stdout, also when it is interrupted. Without a GPU it says so and ends well, unless
asked for ``--size tiny``.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_contenders import FP8, MODES, SIZES, Bench, Contender
from kernel_times import profile
from step_contenders import Step, furthest
from temporary import temporary_folder

from mixtral_recipes.errors import MixtralRecipesError, in_short
from mixtral_recipes.system.machine import package_version
from mixtral_recipes.training.distributed import free_memory

WARMUP = 3  # kernels are compiled and chosen, memory is reserved
# Of a mean loss over thousands of tokens in bf16. Two different random models differ by a few times as much.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}


def synchronize(device: torch.device) -> None:
    """Wait for the card."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, device: torch.device) -> float:
    """How long one step takes."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def used(device: torch.device) -> tuple[float, float]:
    """GB (1e9 bytes) of the card that torch has handed out, and that the driver has."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device) / 1e9, (total - free) / 1e9


def answers(device: torch.device) -> bool:
    """Whether the card still works, its memory given back: after some faults of a kernel a process has lost it."""
    try:
        free_memory()
        synchronize(device)
    except RuntimeError:
        return False
    return True


@dataclass
class Alone:
    """A contender that was built and stepped while no other was there.

    Attributes:
        losses: Of its steps.
        seconds: Of those after the warm-up.
        memory: GB at its peak, by torch and by the driver, what it found there taken off.
        build_seconds: Until it could step.
        first_seconds: Its first step.
    """

    losses: list[float]
    seconds: list[float]
    memory: tuple[float, float]
    build_seconds: float
    first_seconds: float


def alone(contender: Contender, device: torch.device, steps: int) -> Alone:
    """Build a contender, step it, and let it go."""
    if device.type == "cuda":  # what torch keeps for whoever comes next would count as found there
        torch.cuda.empty_cache()
    torch_before, driver_before = used(device)
    start = time.perf_counter()
    step = contender.build()
    synchronize(device)
    built = time.perf_counter() - start
    if device.type == "cuda":  # what building took for a moment is not the step's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []

    def noted() -> float:
        losses.append(step())
        return losses[-1]

    warmup = [seconds_of(noted, device) for _ in range(WARMUP)]
    seconds = [seconds_of(noted, device) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    memory = peak - torch_before, used(device)[1] - driver_before
    return Alone(losses, seconds, memory, built, warmup[0])


def profiles(
    bench: Bench, contenders: list[Contender], seconds: dict[str, list[float]], until: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Where the time of a step of each goes, as `kernel_times.shares`; why not, under ``failed``.

    Each is built once more when all are measured: a process is slower by a tenth or two once it was profiled (pytorch
    issue 144455).
    """
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        try:
            found[contender.name] = _profile(contender, seconds[contender.name], bench.device, until)
        except KeyboardInterrupt:
            found[contender.name], bench.options.limit = {"failed": "interrupted"}, 0.0
        except Exception as error:  # it costs nobody what was measured
            found[contender.name] = {"failed": f"{type(error).__name__}: {in_short(error)}"}
    return found


def _profile(
    contender: Contender, seconds: list[float], device: torch.device, until: Callable[[], float]
) -> dict[str, Any]:
    if until() <= 0:
        return {"failed": "not begun: --limit was reached"}
    if not answers(device):
        return {"failed": "not begun: the card answers no more"}
    step = contender.build()
    for _ in range(WARMUP):
        step()
    return profile(step, steady=statistics.median(seconds))


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """1e12 operations per second of torch.mm on square matrices of normal numbers: the median of ten rounds."""
    size, products = (8192, 20) if device.type == "cuda" else (512, 2)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> float:
        for _ in range(products):
            torch.mm(a, b, out=out)
        return 0.0

    rounds = [seconds_of(step, device) for _ in range(12)][2:]
    return 2 * size**3 * products / statistics.median(rounds) / 1e12


def measure(bench: Bench, until: Callable[[], float]) -> dict[str, Any]:
    """All contenders of one mode; ``until`` gives the seconds that are left."""
    options, device = bench.options, bench.device
    start = time.monotonic()
    before = product_tflops(device, bench.dtype)
    found: dict[str, Alone] = {}
    failed: dict[str, str] = {}
    contenders = bench.contenders()
    for contender in contenders:
        if until() <= 0:
            failed[contender.name] = "not begun: --limit was reached"
            continue
        try:
            one = alone(contender, device, options.steps)
        except KeyboardInterrupt:
            failed[contender.name], options.limit = "interrupted", 0.0
        except Exception as error:  # whoever cannot run is told of, and the others go on
            failed[contender.name] = f"{type(error).__name__}: {in_short(error)}"
            say(f"{bench.mode}: {contender.name}: {failed[contender.name]}")
        else:
            found[contender.name] = one
            say(f"{bench.mode}: {contender.name}: {_row(bench, one.seconds)['tokens_per_second']:,} tokens/s alone")
        if not answers(device):
            rest = [each.name for each in contenders if each.name not in found | failed]
            failed |= dict.fromkeys(rest, f"not begun: the card answers no more since {contender.name}")
            break
    able = [each for each in contenders if each.name in found]
    together = None
    in_time = time.monotonic() - start <= until()  # the same again, with what is compiled by now
    if not options.apart and len(able) > 1 and in_time and answers(device) and _fit_together(found, device):
        together = stepped_in_turn(able, device, options.steps)
    seconds = together or {name: one.seconds for name, one in found.items()}
    speed = statistics.mean([before, product_tflops(device, bench.dtype)]) if answers(device) else before
    ours_first = sorted(able, key=lambda each: not each.ours)
    shares = profiles(bench, ours_first, seconds, until) if options.profile and device.type == "cuda" else {}
    result: dict[str, Any] = {
        "mode": bench.mode,
        "measured": "in turn" if together else "one after another",
        "product_tflops": round(speed, 4),
        "contenders": {
            name: _row(bench, seconds[name], speed) | _told(one, device)
            | ({"profile": shares[name]} if name in shares else {})
            for name, one in found.items()
        }
        | {name: {"failed": reason} for name, reason in failed.items()},
    }  # fmt: skip
    return result | _first_losses(bench, found, able) | _ratios(seconds, able, in_turn=together is not None)


def _fit_together(found: dict[str, Alone], device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(one.memory[1] for one in found.values()) <= 0.95 * free / 1e9


def stepped_in_turn(contenders: list[Contender], device: torch.device, steps: int) -> dict[str, list[float]] | None:
    """Seconds of each contender's steps, one of each in turn, all of them on the card; None if that failed."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    try:
        built = {contender.name: contender.build() for contender in contenders}
        for step in built.values():
            for _ in range(WARMUP):
                step()
        for _ in range(steps):
            for name, step in built.items():
                seconds[name].append(seconds_of(step, device))
    except (RuntimeError, KeyboardInterrupt):  # out of memory, or a kernel's fault: what they were alone is known
        return None
    return seconds


def _row(bench: Bench, seconds: list[float], product_speed: float | None = None) -> dict[str, Any]:
    """Speed from a contender's steps."""
    from mixtral_recipes.training.watch.throughput import flops_per_token

    speeds = [bench.tokens / each for each in seconds]
    flops = flops_per_token(bench.config, bench.sequence, adapters_only=bench.mode != "full")
    tflops = statistics.median(speeds) * flops / 1e12
    row = {
        "tokens_per_second": round(statistics.median(speeds)),
        "spread": [round(min(speeds)), round(max(speeds))],
        "step_seconds": round(statistics.median(seconds), 4),
        "tflops": round(tflops, 4),
    }
    return row | ({"share_of_products": round(tflops / product_speed, 4)} if product_speed else {})


def _told(one: Alone, device: torch.device) -> dict[str, Any]:
    """The rest of a contender's row."""
    row: dict[str, Any] = {
        "first_loss": round(one.losses[0], 5),
        "last_loss": round(one.losses[-1], 5),
        "build_seconds": round(one.build_seconds, 1),
        "first_step_seconds": round(one.first_seconds, 2),
    }
    if device.type == "cuda":
        row |= {"memory_gb_torch": round(one.memory[0], 2), "memory_gb_driver": round(one.memory[1], 2)}
    return row


def _first_losses(bench: Bench, found: dict[str, Alone], contenders: list[Contender]) -> dict[str, Any]:
    """Whether both sides compute the same, as far as this run can tell."""
    exact = {each.name: found[each.name].losses[0] for each in contenders if each.exact and each.name in found}
    if bench.folder is None or len(exact) < 2:
        return {"same_weights": bench.folder is not None, "first_losses_agree": None}
    off = furthest(exact)
    return {
        "same_weights": True,
        "first_losses_differ_by": round(off, 7),
        "first_losses_agree": off <= TOLERANCE[bench.dtype],
    }


def _ratios(seconds: dict[str, list[float]], contenders: list[Contender], *, in_turn: bool) -> dict[str, Any]:
    """How many times as fast as the best other each of ours is, and as each other of ours.

    Stepped in turn, it is the median of the ratios within a turn; otherwise the ratio of the medians.
    """
    own = [each.name for each in contenders if each.ours]
    others = [each.name for each in contenders if not each.ours]

    def ratio(mine: str, other: str) -> float:
        if in_turn:
            pairs = zip(seconds[mine], seconds[other], strict=True)
            return round(statistics.median(theirs / ours for ours, theirs in pairs), 3)
        return round(statistics.median(seconds[other]) / statistics.median(seconds[mine]), 3)

    best = min(others, key=lambda name: statistics.median(seconds[name]), default=None)
    return {
        "best_other": best,
        "to_best_other": {name: ratio(name, best) for name in own} if best else {},
        "to_ours": {name: {other: ratio(name, other) for other in own if other != name} for name in own},
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = "ours, transformers (each way it has to compute experts), or single ways: grouped_mm"
    precisions = "ours in each; fp8 is the recipe's own for this card (bf16 and fp8)"
    recompute = "none, full, full:LAYERS, or modules: moe_act,layernorm; ours with each, theirs if full is the first"
    parser.add_argument("--size", choices=SIZES, default="8x7b")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["lora"])
    parser.add_argument("--contenders", nargs="+", default=["ours", "transformers"], metavar="NAME", help=ways)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp8", *FP8), help=precisions)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=4, help="in a step")
    parser.add_argument("--recompute", nargs="+", default=["none"], metavar="WHAT", help=recompute)
    parser.add_argument("--steps", type=int, default=8, help=f"measured, after {WARMUP} that warm up")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after it")
    parser.add_argument("--apart", action="store_true", help="one after another, even if all fit into the card")
    parser.add_argument("--same-weights", action="store_true", help="whatever the size, through files")
    parser.add_argument("--profile", action="store_true", help="where a step's GPU time goes, and the GPU's idle share")
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="PATH=VALUE", help="of our recipe")
    return parser.parse_args()


def say(text: str) -> None:
    """Tell how far it is; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure each mode; 1 if one of ours cannot run, 2 if a setting is wrong."""
    options = arguments()
    if not torch.cuda.is_available() and options.size != "tiny":
        say("gpu_step.py measures a GPU, and this machine has none; --size tiny runs on a CPU.")
        print(json.dumps({"skipped": "no GPU"}))
        return 0
    warnings.filterwarnings("ignore")
    begun = time.monotonic()
    from mixtral_recipes.training import distributed

    device = distributed.choose_device("auto", distributed.ProcessPlace.from_environment())
    asked = {
        name: value for name, value in vars(options).items() if name not in ("mode", "layers", "sequence", "limit")
    }
    report: dict[str, Any] = {"device": _device(device), "versions": _versions(), "asked": asked}
    results = []
    with temporary_folder() as scratch:
        for mode in options.mode:
            try:
                bench = Bench(options, mode, device, scratch)
            except MixtralRecipesError as error:
                say(f"error: {error}")
                return 2
            report |= {"layers": bench.layers, "sequence": bench.sequence, "tokens_per_step": bench.tokens}
            results.append(measure(bench, lambda: begun + options.limit - time.monotonic()))
            say(json.dumps(results[-1], indent=1))
            if not answers(device):
                break
    print(json.dumps(report | {"results": results}), flush=True)
    distributed.shut_down()
    rows = [(name, row) for result in results for name, row in result["contenders"].items()]
    return int(any(name.startswith("ours") and "failed" in row for name, row in rows))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _versions() -> dict[str, str | None]:
    names = ("torch", "transformer-engine", "megatron-core", "transformers", "peft")
    return {name: package_version(name) for name in names} | {"date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    sys.exit(main())
