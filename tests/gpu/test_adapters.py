"""Adapters of a rank's experts, computed together on a GPU, give what they give one by one, forwards and backwards."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.peft.adapter import Adapter
from mixtral_recipes.peft.dora import DoRAAdapter
from mixtral_recipes.peft.grouped import GroupedAdapter, one_by_one
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.fake_world import one_of

COUNTS = [40, 0, 129, 7]  # one expert has nothing to do
IN, OUT = 256, 512
NAME = "decoder.layers.0.mlp.experts.local_experts.{}.{}"
CONFIG = SimpleNamespace(sequence_parallel=False, gated_linear_unit=True)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with one_of(Topology(world_size=1), 0):
        yield


def adapters_of(kind: type[Adapter], scheme: LoRA, layer: str, device: torch.device) -> list[Adapter]:
    """One for each expert, in bf16, trained a little."""
    torch.manual_seed(0)
    found = []
    for expert in range(len(COUNTS)):
        weight = (torch.randn(OUT, IN) * 0.02).to(device, torch.bfloat16)
        adapter = kind(scheme, NAME.format(expert, layer), weight, column=layer == "linear_fc1", config=CONFIG)
        with torch.no_grad():
            adapter.lora_b.copy_((torch.randn(adapter.lora_b.shape) * 0.02).to(adapter.lora_b))
        found.append(adapter)
    return found


def results(begin: Callable[..., Any], device: torch.device, counts: list[int] = COUNTS) -> list[Tensor]:
    """What comes out of a layer with adapters around it, and the gradient of its input."""
    torch.manual_seed(1)
    rows = sum(counts)
    x, upstream = (torch.randn(rows, width).to(device, torch.bfloat16) for width in (IN, OUT))
    weight = (torch.randn(OUT, IN) * 0.05).to(device, torch.bfloat16)
    x.requires_grad_()
    given, with_adapters = begin(x, torch.tensor(counts))
    added = with_adapters(given @ weight.t())
    added.backward(upstream)
    assert x.grad is not None
    return [added.detach(), x.grad]


@pytest.mark.parametrize("layer", ["linear_fc1", "linear_fc2"])
@pytest.mark.parametrize(("kind", "scheme"), [(Adapter, LoRA), (DoRAAdapter, DoRA)], ids=["lora", "dora"])
@pytest.mark.parametrize("dim", [16, 12])
def test_together_is_one_by_one(
    kind: type[Adapter], scheme: type[LoRA], layer: str, dim: int, cuda: torch.device
) -> None:
    settings = kind, scheme(dim=dim, alpha=32, dropout=0.0), layer, cuda
    grouped, adapters = GroupedAdapter(dict(enumerate(adapters_of(*settings)))), adapters_of(*settings)
    together = results(grouped, cuda)
    alone = results(lambda x, counts: (x, lambda output: one_by_one(adapters, output, x, counts)), cuda)
    for name, parameter in grouped.named_parameters():
        assert parameter.grad is not None
        together.append(parameter.grad)
        each = [getattr(adapter, name) for adapter in adapters]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in each]
        alone.append(torch.stack(gradients).view_as(parameter))
    assert len(together) == len(alone) == 2 + len(list(adapters[0].parameters()))
    for mine, theirs in zip(together, alone, strict=True):  # bf16's rounding, of sums in another order
        apart = (mine.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-6)
        assert apart < 3e-2
    assert any(grad.abs().max() > 0 for grad in together[2:])


@pytest.mark.parametrize(("kind", "scheme"), [(Adapter, LoRA), (DoRAAdapter, DoRA)], ids=["lora", "dora"])
def test_experts_may_all_be_without_a_token(kind: type[Adapter], scheme: type[LoRA], cuda: torch.device) -> None:
    settings = kind, scheme(dim=16, alpha=32, dropout=0.0), "linear_fc1", cuda
    grouped = GroupedAdapter(dict(enumerate(adapters_of(*settings))))
    output, gradient = results(grouped, cuda, [0] * len(COUNTS))
    assert output.shape == (0, OUT)
    assert gradient.shape == (0, IN)
    for parameter in grouped.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
