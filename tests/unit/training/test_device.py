"""What a process tells the libraries about its device: in time, and only where the user has said nothing."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import distributed
from mixtral_recipes.training.distributed import ProcessPlace, choose_device
from mixtral_recipes.training.run import TrainingRun

CODE = """
import os, sys

import torch

torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda index: None
from mixtral_recipes.training.distributed import ProcessPlace, choose_device

def allocated(*sizes, device):
    if "DRIVER_REFUSES" in os.environ:
        raise RuntimeError("CUDA driver error: operation not supported")

torch.empty = allocated
torch.cuda.memory_reserved = lambda device: int(os.environ.get("RESERVED", "0"))
for said in eval(sys.argv[1]):
    if os.fork() == 0:  # the allocator reads its settings once
        os.environ.update(said)
        device = choose_device("auto", ProcessPlace(0, 0, 1))
        allocator = torch._C._cuda_memorySnapshot(None)["allocator_settings"]
        print(device, allocator["expandable_segments"], sorted(said), flush=True)
        assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == said.get("PYTORCH_CUDA_ALLOC_CONF")  # ranks ask anew
        os._exit(0)
    os.wait()
"""
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def test_the_environment_of_a_gpu() -> None:
    found = {
        "cuda:0 True []": {},
        "cuda:0 False ['PYTORCH_CUDA_ALLOC_CONF']": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
        "cuda:0 False ['PYTORCH_ALLOC_CONF']": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
        "cuda:0 False ['DRIVER_REFUSES']": {"DRIVER_REFUSES": "1"},
        "cuda:0 False ['RESERVED']": {"RESERVED": "2097152"},
    }
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", CODE, repr(list(found.values()))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == list(found), done.stderr


@pytest.mark.parametrize(
    ("layout", "accelerator", "before", "set_to"),
    [
        ({}, "gpu", None, None),
        ({"expert_model_parallel_size": 8}, "gpu", None, None),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "gpu", None, "1"),
        ({"context_parallel_size": 2}, "auto", None, "1"),
        ({"context_parallel_size": 2}, "gpu", "32", "32"),
        ({"context_parallel_size": 2}, "cpu", None, None),
    ],
)
def test_kernels_begin_in_order_where_communication_overlaps_with_them(
    layout: dict[str, Any],
    accelerator: str,
    before: str | None,
    set_to: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts' products run on several streams, so others leave it to CUDA."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    found: list[str | None] = []
    monkeypatch.setattr(distributed, "choose_device", lambda *_: found.append(os.environ.get(name)))
    monkeypatch.setattr(distributed, "initialize", lambda *_, **__: None)
    distributed.join(Trainer(accelerator=accelerator, devices=8, strategy=MegatronStrategy(**layout)))
    assert found == [set_to]


def test_the_next_run_of_a_process_finds_no_losses_of_this_ones_groups_and_layers() -> None:
    get_moe_metrics_tracker().record("load_balancing_loss", torch.ones(()), layer_number=1, num_layers=2)
    distributed.shut_down()
    assert not get_moe_metrics_tracker().metrics


def test_no_more_threads_than_a_container_gets_the_time_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(distributed.cpu_device, "activate", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(distributed.machine, "cores", lambda: 2)
    assert choose_device("cpu", ProcessPlace(0, 0, 1)) == torch.device("cpu")
    assert told == [2]


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
@pytest.mark.parametrize(
    "says",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it."),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(
    accelerator: str, says: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise says

    monkeypatch.setattr(distributed.machine, "gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refused)
    reason, version = re.escape(str(says).partition(". ")[0]), re.escape(torch.__version__)
    with pytest.raises(EnvironmentProblem, match=rf"2 GPU\(s\) that torch {version} cannot use: {reason}\. "):
        choose_device(accelerator, ProcessPlace(0, 0, 1))


@pytest.mark.parametrize(("device", "multiple"), [("cpu", 8), ("cuda", 64)])
def test_lengths_of_padded_rows_are_few_where_attention_is_planned_for_each(device: str, multiple: int) -> None:
    topology = SimpleNamespace(
        context_parallel_size=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_slices=1
    )
    run = SimpleNamespace(
        device=torch.device(device),
        topology=topology,
        trainer=SimpleNamespace(plugins=MegatronMixedPrecision("bf16-mixed")),
        config=SimpleNamespace(tp_comm_overlap=False),
    )
    shape = cast(Any, TrainingRun.loader_shape).fget(run)
    assert shape == {"multiple": multiple, "sequence_multiple": 1, "fixed": False}
    topology.tensor_model_parallel_size, topology.context_slices = 3, 5
    assert cast(Any, TrainingRun.loader_shape).fget(run)["multiple"] == multiple * 15
