"""Callbacks do what their names say."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.training.watch import callbacks
from mixtral_recipes.training.watch.profiling import MemoryProfileCallback, NsysCallback, PytorchProfilerCallback

CPU = SimpleNamespace(device=torch.device("cpu"))


def test_hooks_are_called_in_order_where_they_exist() -> None:
    seen: list[Any] = []
    first = SimpleNamespace(on_step_end=lambda run, metrics: seen.append(("first", metrics)))
    second = SimpleNamespace(on_step_end=lambda run, metrics: seen.append(("second", metrics)), other=1)
    callbacks.call([first, second], "on_step_end", CPU, {"step": 1})
    callbacks.call(None, "on_step_end", CPU, {})
    callbacks.call([first], "on_train_start", CPU)
    assert seen == [("first", {"step": 1}), ("second", {"step": 1})]


def test_timing_reports_wall_time() -> None:
    timing, metrics = callbacks.TimingCallback(), {}
    timing.on_train_start(CPU)
    timing.on_step_end(CPU, metrics)
    assert 0 <= metrics["step_seconds"] < 5


def test_garbage_is_collected_when_it_says_and_automatic_collection_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    callback = callbacks.GarbageCollectionCallback(gc_interval_train=2, gc_interval_val=3)
    callback.on_train_start(CPU)
    try:
        assert not gc.isenabled()
        for step in range(1, 6):
            callback.on_step_end(CPU, {"step": step})
        assert len(collected) == 2
        for _ in range(3):
            callback.on_validation_end(CPU, {})
        assert len(collected) == 3
    finally:
        callback.on_train_end(CPU)
    assert gc.isenabled()


def _settings(topology: Topology) -> dict[str, dict[str, Any]]:
    return {"model": {}, "ddp": {}, "optimizer": {}, "run": {"topology": topology, "device": torch.device("cpu")}}


def test_token_drop_sets_the_routers_capacity() -> None:
    settings = _settings(Topology(1))
    callbacks.MegatronTokenDropCallback(moe_expert_capacity_factor=1.5).configure(settings)
    assert settings["model"] == {"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True}


def test_overlap_follows_the_layout() -> None:
    alone, parallel = _settings(Topology(1)), _settings(Topology(4, pipeline_model_parallel_size=2))
    callbacks.MegatronCommOverlapCallback(tp_comm_overlap=True).configure(alone)
    assert alone["ddp"] == {"overlap_grad_reduce": False, "overlap_param_gather": False}
    assert alone["model"] == {"tp_comm_overlap": False}, "it needs a GPU"
    on_gpus = _settings(Topology(2, tensor_model_parallel_size=2, sequence_parallel=True))
    on_gpus["run"]["device"] = torch.device("cuda")
    callbacks.MegatronCommOverlapCallback().configure(on_gpus)
    assert on_gpus["model"] == {}, "off unless asked for"
    callbacks.MegatronCommOverlapCallback(tp_comm_overlap=True).configure(on_gpus)
    assert on_gpus["model"] == {"tp_comm_overlap": True}
    deferring = callbacks.MegatronCommOverlapCallback(bucket_size=7, defer_embedding_wgrad_compute=True)
    deferring.configure(on_gpus)
    assert "defer_embedding_wgrad_compute" not in on_gpus["model"], "it needs pipeline stages"
    deferring.configure(parallel)
    assert parallel["model"]["defer_embedding_wgrad_compute"] is False, "and a GPU"
    assert parallel["ddp"] == {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 7}
    assert parallel["model"]["batch_p2p_comm"] is True
    parallel["run"]["device"] = torch.device("cuda")
    deferring.configure(parallel)
    assert parallel["model"]["defer_embedding_wgrad_compute"] is True


@pytest.mark.parametrize("setting", [{"overlap_p2p_comm": False}, {"batch_p2p_comm": True}])
def test_batched_sends_between_two_interleaved_stages_are_refused(setting: dict[str, bool]) -> None:
    callback = callbacks.MegatronCommOverlapCallback(**setting)
    two = Topology(2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(RecipeError, match=next(iter(setting))):
        callback.configure(_settings(two))
    callback.configure(_settings(Topology(4, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)))
    callback.configure(_settings(Topology(2, pipeline_model_parallel_size=2)))


def _steps(callback: Any, count: int) -> None:
    callbacks.call([callback], "on_train_start", CPU)
    for step in range(1, count + 1):
        callbacks.call([callback], "on_step_start", CPU, step)
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        callbacks.call([callback], "on_step_end", CPU, {"step": step})
    callbacks.call([callback], "on_train_end", CPU)


@pytest.mark.parametrize("steps", [5, 3])
def test_profiler_writes_one_trace_also_when_training_ends_early(tmp_path: Path, steps: int) -> None:
    _steps(PytorchProfilerCallback(2, 4, trace_dir=str(tmp_path / "trace")), steps)
    (trace,) = (tmp_path / "trace").iterdir()
    assert trace.name == "rank-0.json"
    assert any("mm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])


def test_profiler_leaves_other_ranks_alone(tmp_path: Path) -> None:
    _steps(PytorchProfilerCallback(1, 2, trace_dir=str(tmp_path / "trace"), ranks=[1]), 3)
    assert not (tmp_path / "trace").exists()


def test_memory_snapshot(tmp_path: Path) -> None:
    _steps(MemoryProfileCallback(dir=str(tmp_path / "memory"), steps=2), 4)
    assert "size=" in (tmp_path / "memory" / "rank-0.txt").read_text()


def test_nsys_does_nothing_without_a_gpu() -> None:
    _steps(NsysCallback(1, 2), 3)


@pytest.mark.parametrize("make", [NsysCallback, lambda a, b: PytorchProfilerCallback(a, b, trace_dir="unused")])
def test_ranges_are_checked(make: Any) -> None:
    with pytest.raises(RecipeError, match="are not a valid range"):
        callbacks.call([make(3, 2)], "on_train_start", CPU)
