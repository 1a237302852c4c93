"""The stand-ins that let Megatron run without a driver, one by one, and that all of them go away again."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.errors import EnvironmentProblem


@pytest.fixture
def active() -> Iterator[None]:
    assert not cpu_device.active()
    cpu_device.activate()
    yield
    cpu_device.deactivate()


def test_it_refuses_where_a_gpu_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentProblem, match="a CUDA device is available"):
        cpu_device.activate()
    assert not cpu_device.active()


def test_everything_is_put_back() -> None:
    names = [(torch, "empty"), (torch.cuda, "Stream"), (torch.cuda, "current_device"), (torch.Tensor, "cuda")]
    before = [getattr(target, name) for target, name in names]
    cpu_device.activate()
    assert [getattr(target, name) for target, name in names] != before
    cpu_device.activate()  # a second time changes nothing
    cpu_device.deactivate()
    assert [getattr(target, name) for target, name in names] == before


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), 0], ids=str)
def test_factories_take_a_cuda_device_for_the_cpu(device: object) -> None:
    made = [
        torch.empty(2, device=device),
        torch.zeros(2, device=device),
        torch.full((2,), 1.0, device=device),
        torch.tensor([1.0], device=device, pin_memory=True),
        torch.arange(2, device=device),
        torch.randn(2, device=device),
    ]
    assert {str(tensor.device) for tensor in made} == {"cpu"}
    assert torch.ones(1, device="meta").is_meta


@pytest.mark.usefixtures("active")
def test_tensors_and_modules_stay_where_they_are() -> None:
    tensor, module = torch.ones(1), torch.nn.Linear(1, 1)
    assert tensor.cuda() is tensor
    assert module.cuda() is module


@pytest.mark.usefixtures("active")
def test_streams_and_events_are_always_done() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = stream.record_event()
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert event.query()
    assert stream.elapsed_time(event) == 0.0


@pytest.mark.usefixtures("active")
def test_the_cuda_random_state_is_the_cpus() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.usefixtures("active")
def test_tensors_give_cudas_type_names_only_while_asked_to() -> None:
    tensor = torch.ones(1)
    with cpu_device.cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.type(torch.float64).dtype is torch.float64
    assert tensor.type() == "torch.FloatTensor"


def test_transformer_engine_without_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setattr(moe_utils, "te_general_gemm", object(), raising=False)
    monkeypatch.setattr(megatron_optimizer, "Adam", object())
    cpu_device.activate()
    assert megatron_optimizer.Adam is torch.optim.AdamW
    assert moe_utils.te_general_gemm is None
    cpu_device.deactivate()


def test_transformers_loads_whole_models_beside_it(tmp_path: Path) -> None:
    """In a fresh process: torch remembers its factories when `with torch.device` is first used."""
    code = f"""
import torch
from mixtral_recipes.cpu import device as cpu_device
cpu_device.activate()
with torch.device("meta"):
    assert torch.empty(1).is_meta and torch.arange(2).is_meta
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=1)
MixtralForCausalLM(config).save_pretrained({str(tmp_path)!r})
for _ in range(3):
    model = MixtralForCausalLM.from_pretrained({str(tmp_path)!r})
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
