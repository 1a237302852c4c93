"""The benchmark of a GPU's step on a CPU at a tiny size, and what it asks of our recipes at 8x7B's."""

import argparse
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_recipes.models.config import MixtralConfigTiny
from mixtral_recipes.training.distributed import free_memory
from tests.distributed.harness import launch

ROOT = Path(__file__).parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_both_sides_take_the_same_steps() -> None:
    done = run("--size", "tiny", "--mode", "lora", "full", "--contenders", "ours", "grouped_mm", "deepgemm",
               "--layers", "1", "--microbatches", "2", "--steps", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["device"] == "cpu"
    assert [result["mode"] for result in report["results"]] == ["lora", "full"]
    for result in report["results"]:
        assert result["first_losses_agree"], result
        assert result["measured"] == "in turn"
        assert result["best_other"] == "transformers grouped_mm"
        own, other = (result["contenders"][name] for name in ("ours fp32", "transformers grouped_mm"))
        assert own["first_loss"] != own["last_loss"]
        assert own["first_loss"] == pytest.approx(other["first_loss"], rel=1e-4)
        assert own["tflops"] == pytest.approx(own["share_of_products"] * result["product_tflops"], rel=0.2)
        assert set(result["to_best_other"]) == {"ours fp32"}
        assert "no backward pass" in result["contenders"]["transformers deepgemm"]["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_goes_on() -> None:
    done = run()
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"skipped": "no GPU"}
    assert "has none" in done.stderr


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of the benchmark's modules, which import each other by bare names as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


def options(**given: Any) -> argparse.Namespace:
    usual: dict[str, Any] = {
        "size": "8x7b", "contenders": ["ours"], "precisions": None, "layers": None, "sequence": None,
        "micro_batch": 1, "microbatches": 4, "recompute": ["none"], "same_weights": False, "settings": [],
    }  # fmt: skip
    return argparse.Namespace(**(usual | given))


@pytest.mark.parametrize("mode", ["lora", "lora-attention", "full"])
@pytest.mark.parametrize(
    ("precision", "recompute"),
    [
        *((precision, "none") for precision in ("bf16", "fp8", "delayed", "tensorwise", "blockwise")),
        *(("bf16", recompute) for recompute in ("full", "full:2", "moe_act,layernorm")),
        ("fp8", "full:2"),
    ],
)
def test_a_recipe_for_every_contender(
    mode: str, precision: str, recompute: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mixtral_recipes.planner.workload import Workload
    from mixtral_recipes.training.model import check_megatron_config

    gpu_contenders = module("gpu_contenders", monkeypatch)
    bench = gpu_contenders.Bench(options(layers=3, sequence=2048), mode, torch.device("cpu"), tmp_path)
    recipe = bench.recipe(precision, recompute)
    parts = bench.parts(precision, recompute)
    config, trainer, peft = parts["model"].config, parts["trainer"], parts["peft"]
    check_megatron_config(config, trainer)
    job = Workload.of(recipe)
    assert bench.folder is None  # three layers are too large for both sides to start from the same files
    assert (config.num_layers, config.seq_length, config.hidden_size, config.num_moe_experts) == (3, 2048, 4096, 8)
    assert trainer.world_size == trainer.topology().world_size == 1
    assert bool(trainer.plugins.fp8) == (precision != "bf16")
    assert precision in ("bf16", "fp8") or job.fp8_recipe == precision
    assert (trainer.plugins.fp8_param_gather is None) == (precision != "bf16")  # what a user of FP8 gets
    granularity = {"none": "", "full": "full", "full:2": "full", "moe_act,layernorm": "selective"}[recompute]
    assert job.recompute.granularity == granularity
    assert (peft is None) == (mode == "full")
    if peft is not None:
        assert peft.dim == peft.alpha == 16
        assert len(peft.targets()) == (2 if mode == "lora-attention" else 4)


def left_behind(scratch: str) -> list[int]:
    """Bytes of tensors that are still there after one build of ours, and after two more."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    gpu_step, gpu_contenders = importlib.import_module("gpu_step"), importlib.import_module("gpu_contenders")
    given = options(size="tiny", precisions=["bf16"], layers=1, microbatches=1)
    bench = gpu_contenders.Bench(given, "full", torch.device("cpu"), Path(scratch))
    (ours,) = bench.contenders()
    sizes = []
    for builds in (1, 2):
        for _ in range(builds):
            gpu_step.alone(ours, bench.device, 1)
            free_memory()
        sizes.append(sum(each.nbytes for each in gc.get_objects() if issubclass(type(each), torch.Tensor)))
    return sizes


def test_memory_is_released_before_the_next(tmp_path: Path) -> None:
    ((once, thrice),) = launch(1, left_behind, str(tmp_path))
    assert thrice - once < 2e5  # one build's weights, masters, gradients and moments are 4e7 bytes


def test_a_card_that_is_lost_takes_no_result_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call to CUDA fails, those that give memory back too."""
    gpu_step, gpu_contenders = module("gpu_step", monkeypatch), module("gpu_contenders", monkeypatch)
    lost = []

    def fault() -> Any:
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def free() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def product(device: torch.device, dtype: torch.dtype) -> float:
        free()
        return 800.0

    monkeypatch.setattr(gpu_step, "free_memory", free)
    monkeypatch.setattr(gpu_step, "product_tflops", product)
    builds = {"good": lambda: lambda: 7.0, "bad": fault, "late": lambda: lambda: 7.0}
    contenders = [gpu_contenders.Contender(name, build) for name, build in builds.items()]
    bench = SimpleNamespace(
        options=options(steps=1, apart=False, profile=False), mode="full", device=torch.device("cpu"), folder=None,
        dtype=torch.float32, config=MixtralConfigTiny(), sequence=64, tokens=64, contenders=lambda: contenders,
    )  # fmt: skip
    result = gpu_step.measure(bench, lambda: 100.0)
    assert result["contenders"]["good"]["first_loss"] == 7.0
    assert "illegal memory access" in result["contenders"]["bad"]["failed"]
    assert result["contenders"]["late"] == {"failed": "not begun: the card answers no more since bad"}


def test_settings_change_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = options(settings=["model.config.accelerate=false", "optim.config.weight_decay=0.5"])
    bench = module("gpu_contenders", monkeypatch).Bench(given, "full", torch.device("cpu"), tmp_path)
    parts = bench.parts("bf16", "none")
    assert not parts["model"].config.accelerate
    assert parts["optim"].config.weight_decay == 0.5


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_step = module("gpu_step", monkeypatch)
    contender = module("gpu_contenders", monkeypatch).Contender
    able = [
        contender("ours bf16", float, ours=True),
        contender("ours fp8", float, ours=True),
        contender("transformers a", float),
        contender("transformers b", float),
    ]
    seconds = {
        "ours bf16": [2.0, 2.0, 8.0],  # the third turn was slow for everyone
        "ours fp8": [1.0, 1.0, 4.0],
        "transformers a": [9.0, 9.0, 9.0],
        "transformers b": [4.0, 6.0, 24.0],
    }
    found = gpu_step._ratios(seconds, able, in_turn=True)
    assert found["best_other"] == "transformers b"
    assert found["to_best_other"] == {"ours bf16": 3.0, "ours fp8": 6.0}
    assert found["to_ours"]["ours fp8"] == {"ours bf16": 2.0}
    apart = gpu_step._ratios(seconds, able, in_turn=False)
    assert apart["to_best_other"]["ours bf16"] == 3.0  # 6 / 2
    alone = gpu_step._ratios({"ours bf16": [1.0]}, able[:1], in_turn=False)
    assert (alone["best_other"], alone["to_best_other"]) == (None, {})


def stand_in(contenders: list[Any], **given: Any) -> Any:
    """A bench whose contenders are functions."""
    from mixtral_recipes.models.config import MixtralConfigTiny

    asked = options(steps=2, profile=False, **({"apart": False} | given))
    return SimpleNamespace(
        options=asked, mode="lora", device=torch.device("cpu"), dtype=torch.float32, tokens=100, sequence=64,
        config=MixtralConfigTiny(), folder=Path("same"), contenders=lambda: contenders,
    )  # fmt: skip


def test_one_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_step, contender = module("gpu_step", monkeypatch), module("gpu_contenders", monkeypatch).Contender

    def built(loss: float) -> Callable[[], Callable[[], float]]:
        return lambda: lambda: loss

    def broken() -> Any:
        raise ImportError("needs a library\nand more words")

    able = [
        contender("ours bf16", built(7.0), ours=True),
        contender("transformers a", built(7.0001)),
        contender("transformers b", broken),
        contender("ours fp8", built(7.5), ours=True, exact=False),
    ]
    result = gpu_step.measure(stand_in(able), lambda: 1e9)
    assert result["measured"] == "in turn"
    assert result["contenders"]["transformers b"] == {"failed": "ImportError: needs a library"}
    assert result["contenders"]["ours fp8"]["first_loss"] == 7.5
    assert result["first_losses_agree"]
    assert not gpu_step.measure(stand_in([able[0], contender("t", built(7.1))]), lambda: 1e9)["first_losses_agree"]

    assert gpu_step.measure(stand_in(able, apart=True), lambda: 1e9)["measured"] == "one after another"

    left = iter([10.0, 10.0, 0.0, 0.0, 0.0])
    late = gpu_step.measure(stand_in(able), lambda: next(left))
    assert late["measured"] == "one after another"
    assert [name for name, row in late["contenders"].items() if "--limit" in row.get("failed", "")] == [
        "transformers b", "ours fp8",
    ]  # fmt: skip


def test_memory_that_runs_out_in_turn_leaves_what_was_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_step, contender = module("gpu_step", monkeypatch), module("gpu_contenders", monkeypatch).Contender
    times = iter(range(3))

    def third_time_too_many() -> Any:
        if next(times) == 2:
            raise torch.OutOfMemoryError("no room")
        return lambda: 1.0

    able = [contender("ours bf16", third_time_too_many, ours=True), contender("transformers a", third_time_too_many)]
    result = gpu_step.measure(stand_in(able), lambda: 1e9)
    assert result["measured"] == "one after another"
    assert set(result["to_best_other"]) == {"ours bf16"}


def test_one_that_cannot_be_profiled_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_step, contender = module("gpu_step", monkeypatch), module("gpu_contenders", monkeypatch).Contender
    monkeypatch.setattr(gpu_step, "profile", lambda step, steady: {"idle": step() / steady})

    def broken() -> Any:
        raise RuntimeError("no room")

    def interrupted() -> Any:
        raise KeyboardInterrupt

    builds = {"a": broken, "b": lambda: lambda: 1.0, "c": interrupted, "d": lambda: lambda: 1.0}
    able = [contender(name, build) for name, build in builds.items()]
    bench = stand_in(able)
    bench.options.limit = 9.0
    found = gpu_step.profiles(bench, able, {name: [1.0, 2.0, 9.0] for name in builds}, lambda: bench.options.limit)
    assert found == {
        "a": {"failed": "RuntimeError: no room"},
        "b": {"idle": 0.5},
        "c": {"failed": "interrupted"},
        "d": {"failed": "not begun: --limit was reached"},
    }


def test_traffic_is_counted_by_operator() -> None:
    command = [sys.executable, "benchmarks/gpu_traffic.py", "--size", "tiny", "--steps", "1", "--operators", "500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    operators = {each["name"]: each for each in found["operators"]}
    assert operators["aten.mm.default"]["calls"] > 0
    assert not [name for name in operators if "view" in name or "empty" in name]
    assert found["mb"] == pytest.approx(sum(each["mb"] for each in found["operators"]), rel=0.01)


def test_an_operator_touches_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = module("gpu_traffic", monkeypatch).Traffic(torch.device("cpu"))
    x, y = torch.randn(4, 8), torch.randn(8, 2)
    with traffic.counting():
        x.t().mm(x)
        torch.mm(x, y).add_(1)
    assert traffic.calls == {"aten.mm.default": 2, "aten.add_.Tensor": 1}
    assert traffic.moved == {"aten.mm.default": 4 * (32 + 64 + 32 + 16 + 8), "aten.add_.Tensor": 4 * 8}
