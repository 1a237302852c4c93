"""One adapter's arithmetic, against the formulas of the papers."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.peft import grouped
from mixtral_recipes.peft.adapter import Adapter
from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.peft.dora import DoRAAdapter
from mixtral_recipes.peft.grouped import GroupedAdapter, around_experts, one_by_one
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.fake_world import one_of

CONFIG = SimpleNamespace(sequence_parallel=False, gated_linear_unit=True)
NAME = "decoder.layers.0.self_attention.linear_proj"


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with one_of(Topology(world_size=1), 0):
        yield


def trained(kind: type[Adapter], scheme: LoRA, weight: Tensor, *, name: str = NAME) -> Adapter:
    """An adapter whose B is no longer zero."""
    adapter = kind(scheme, name, weight, column=False, config=CONFIG)
    with torch.no_grad():
        adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape))
    return adapter


def test_lora_adds_alpha_over_dim_times_b_a() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    adapter = trained(Adapter, LoRA(dim=4, alpha=32), weight)
    update = 32 / 4 * (adapter.lora_b @ adapter.lora_a)
    torch.testing.assert_close(adapter.delta(), update)
    torch.testing.assert_close(adapter.add_to(x @ weight.t(), x), x @ (weight + update).t())


def test_an_adapter_starts_at_the_base() -> None:
    adapter = Adapter(LoRA(dim=4, alpha=32), NAME, torch.randn(6, 8), column=False, config=CONFIG)
    assert not adapter.delta().any()
    assert adapter.lora_a.abs().max() > 0, "then B would never learn"


def test_dora_gives_the_adapted_weights_rows_their_learned_lengths() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    adapter = trained(DoRAAdapter, DoRA(dim=4, alpha=8), weight)
    assert isinstance(adapter, DoRAAdapter)
    torch.testing.assert_close(adapter.magnitude.data, weight.norm(dim=1), msg="it starts at the base's lengths")
    with torch.no_grad():
        adapter.magnitude.mul_(torch.rand(6) + 0.5)
    adapted = weight + 8 / 4 * (adapter.lora_b @ adapter.lora_a)
    merged = adapter.magnitude.unsqueeze(1) * adapted / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + adapter.delta(), merged)
    torch.testing.assert_close(adapter.add_to(x @ weight.t(), x), x @ merged.t())


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_dora_leaves_a_row_without_a_length_as_it_is(value: float) -> None:
    """Also one whose squares are too small for float32."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    weight[2] = value
    adapter = DoRAAdapter(DoRA(dim=4, alpha=8), NAME, weight, column=False, config=CONFIG)
    assert isinstance(adapter, DoRAAdapter)
    torch.testing.assert_close(adapter.add_to(x @ weight.t(), x), x @ weight.t())
    torch.testing.assert_close(weight + adapter.delta(), weight)
    adapter.add_to(x @ weight.t(), x).square().sum().add(adapter.add_to(x @ weight.t(), x).sum()).backward()
    for parameter in (adapter.lora_a, adapter.lora_b, adapter.magnitude):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert adapter.lora_b.grad is not None
    assert adapter.lora_b.grad[2].any(), "the row can learn"


def test_dora_brings_a_row_that_left_zero_to_its_learned_length() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    weight[2] = 0
    adapter = trained(DoRAAdapter, DoRA(dim=4, alpha=8), weight)
    assert isinstance(adapter, DoRAAdapter)
    with torch.no_grad():
        adapter.magnitude.fill_(0.7)
    merged = weight + adapter.delta()
    torch.testing.assert_close(merged.norm(dim=1), torch.full((6,), 0.7))
    torch.testing.assert_close(adapter.add_to(x @ weight.t(), x), x @ merged.t())


def test_a_gated_layers_b_keeps_gate_and_up_apart() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 8)
    adapter = trained(Adapter, LoRA(dim=4, alpha=4), weight, name="decoder.layers.0.mlp.experts.experts.0.linear_fc1")
    assert adapter.lora_b.shape == (2, 6, 4)
    gate, up = adapter.lora_b @ adapter.lora_a
    torch.testing.assert_close(adapter.delta(), torch.cat([gate, up]))


class Halved(Adapter):
    """An adapter with a forward pass of its own."""

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        return super().add_to(output, x / 2)


class AView(torch.autograd.Function):
    """A layer that returns a view of its result, as Transformer Engine's do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x @ weight.t()).view(len(x), len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0], None


COUNTS = [3, 0, 5, 1]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 2]], ids=["all", "some"])
@pytest.mark.parametrize("layer", ["linear_fc1", "linear_fc2"])
@pytest.mark.parametrize("counts", [COUNTS, torch.tensor(COUNTS)], ids=["numbers", "tensor"])
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (Adapter, LoRA(dim=4, alpha=12)),
        (DoRAAdapter, DoRA(dim=8, alpha=12)),
        (Adapter, LoRA(dim=2, dropout_position="post")),
        (Halved, LoRA(dim=4)),
    ],
    ids=["lora", "dora", "post", "another"],
)
def test_experts_together_are_the_experts_one_by_one(
    kind: type[Adapter],
    scheme: LoRA,
    counts: list[int] | Tensor,
    layer: str,
    chosen: list[int],
) -> None:
    def made() -> dict[int, Adapter]:
        torch.manual_seed(0)
        name = f"decoder.layers.0.mlp.experts.experts.{{}}.{layer}"
        return {n: trained(kind, scheme, torch.randn(16, 24), name=name.format(n)) for n in chosen}

    x, base, upstream = torch.randn(9, 24), torch.randn(16, 24), torch.randn(9, 16)

    def results(begin: Callable[..., Any]) -> list[Any]:
        leaf = x.clone().requires_grad_()
        given, with_adapters = begin(leaf, counts)
        output = AView.apply(given, base)
        added = with_adapters(output)
        added.backward(upstream)
        in_place = kind is Adapter and begin is grouped
        assert (added.data_ptr() == output.data_ptr()) == in_place
        return [added, leaf.grad]

    grouped, adapters = GroupedAdapter(made()), made()
    together = results(grouped)
    each_expert = [adapters.get(n) for n in range(len(COUNTS))]
    alone = results(lambda x, counts: (x, lambda output: one_by_one(each_expert, output, x, counts)))
    assert not torch.allclose(together[0], x @ base.t())
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    of_all = dict(grouped.named_parameters())
    assert adapters_of([grouped]) == [grouped]
    grouped.eval()
    assert not any(adapter.training for adapter in grouped.experts.values())
    assert set(of_all) == {"lora_a", "lora_b", *(["magnitude"] if kind is DoRAAdapter else [])}
    for name, parameter in of_all.items():
        each: list[Any] = [getattr(adapter, name).grad for adapter in adapters.values()]
        torch.testing.assert_close(parameter.grad, torch.stack(each).view_as(parameter))


@pytest.mark.parametrize("layer", ["linear_fc1", "linear_fc2"])
def test_experts_together_are_stored_as_one_by_one(layer: str) -> None:
    def made() -> list[Adapter]:
        torch.manual_seed(0)
        name = f"decoder.layers.0.mlp.experts.{{}}.{layer}"
        return [trained(DoRAAdapter, DoRA(dim=8), torch.randn(16, 24), name=name.format(n)) for n in (1, 2)]

    adapters, grouped = made(), GroupedAdapter(dict(enumerate(made())))
    expected = {key: each for adapter in adapters for key, each in adapter.sharded_state_dict().items()}
    found = {key: each for factory in grouped.sharded_state_dict().values() for key, each in factory.build().items()}
    assert set(found) == set(expected)
    assert len(found) == 2 * 3
    for key, each in expected.items():
        assert (found[key].global_shape, found[key].global_offset) == (each.global_shape, each.global_offset)
        torch.testing.assert_close(found[key].data, each.data)
    for parameter, one in ((grouped.lora_a, adapters[0].lora_a), (grouped.magnitude, adapters[0].magnitude)):
        assert cast(Any, parameter).allreduce == cast(Any, one).allreduce


@pytest.mark.parametrize("grouped", [False, True], ids=["each", "grouped"])
@pytest.mark.parametrize(("kind", "scheme"), [(Adapter, LoRA(dim=8)), (DoRAAdapter, DoRA(dim=8))], ids=["lora", "dora"])
def test_a_model_without_its_adapters_has_none_on_experts_that_are_computed_together(
    kind: type[Adapter], scheme: LoRA, grouped: bool
) -> None:
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2"
    adapters = [trained(kind, scheme, torch.randn(16, 24), name=name.format(n)) for n in range(2)]
    held = [GroupedAdapter(dict(enumerate(adapters)))] if grouped else adapters
    layers = nn.ModuleList(nn.Module() for _ in held)
    for layer, adapter in zip(layers, held, strict=True):
        layer.adapter = adapter
    output, x = torch.randn(9, 16), torch.randn(9, 24)

    def adapted() -> Tensor:
        begun = held[0](x, [4, 5]) if grouped else around_experts(adapters, x, [4, 5])
        return begun[1](output.clone())

    added = adapted()
    with InferenceModel.without_adapters(cast(Any, SimpleNamespace(chunk=layers))):
        torch.testing.assert_close(adapted(), output)
    torch.testing.assert_close(adapted(), added)
    assert not torch.equal(added, output)


def test_a_length_learns_from_thousands_of_rows() -> None:
    """Added up in bf16 row by row, a third of this gradient would be lost."""
    torch.manual_seed(0)
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2"
    weights = torch.randn(2, 16, 24).bfloat16() * 0.1
    adapters = [trained(DoRAAdapter, DoRA(dim=8), w, name=name.format(n)) for n, w in enumerate(weights)]
    output, x = torch.randn(5000, 16).bfloat16(), torch.randn(5000, 24).bfloat16()

    def of_lengths(add: Callable[..., Tensor]) -> Tensor:
        for adapter in adapters:
            adapter.zero_grad()
        add(adapters, output.clone(), x, torch.tensor([4096, 904])).backward(output)  # all rows pull the same way
        return torch.cat([cast(Tensor, cast(Any, adapter).magnitude.grad).float() for adapter in adapters])

    expected = of_lengths(one_by_one)
    together = of_lengths(lambda adapters, output, x, counts: around_experts(adapters, x, counts)[1](output))
    assert (together - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_of_experts_together_is_of_the_adapters_only(position: Any) -> None:
    torch.manual_seed(0)
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2"
    scheme = LoRA(dim=8, dropout=0.5, dropout_position=position)
    adapters = [trained(Adapter, scheme, torch.randn(16, 24), name=name.format(n)) for n in range(2)]
    x, output = torch.randn(400, 24, requires_grad=True), torch.randn(400, 16)
    given, with_adapters = around_experts(adapters, x, [150, 250])
    assert given is x
    added = with_adapters(output.clone()) - output
    for adapter in adapters:
        adapter.eval()
    whole = around_experts(adapters, x, [150, 250])[1](output.clone()) - output
    if position == "post":
        kept = added != 0
        assert 0.4 < kept.float().mean() < 0.6
        torch.testing.assert_close(added[kept], 2 * whole[kept], rtol=1e-3, atol=1e-3)
    else:
        assert not torch.allclose(added, whole, rtol=0.1)
        assert 0.4 < (added * whole).sum() / whole.square().sum() < 1.6


def as_on_blackwell(x: Tensor, other: Tensor, offs: Tensor) -> Tensor:
    """The grouped product, whose sums over the rows of an expert without any are what was in memory."""
    parts = list(itertools.pairwise([0, *offs.tolist()]))
    if other.dim() == 3:
        return torch.cat([x[start:end] @ w for (start, end), w in zip(parts, other, strict=True)])
    sums = [x[:, start:end] @ other[start:end] for start, end in parts]
    empty = [end == start for start, end in parts]
    return torch.stack([each + float("nan") if none else each for each, none in zip(sums, empty, strict=True)])


def test_an_expert_without_a_token_learns_nothing_whatever_the_kernel_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc2"
    scheme = LoRA(dim=8, dropout=0.0)
    adapters = [trained(Adapter, scheme, torch.randn(16, 24), name=name.format(n)) for n in range(3)]
    monkeypatch.setattr(grouped, "_grouped_product", as_on_blackwell)
    monkeypatch.setattr(grouped, "_idle_get_rubbish", lambda device: True)
    around_experts(adapters, torch.randn(6, 24), [4, 0, 2])[1](torch.randn(6, 16)).sum().backward()
    for adapter, busy in zip(adapters, (True, False, True), strict=True):
        for weight in adapter.parameters():
            gradient = cast(Tensor, weight.grad)
            assert bool(gradient.isfinite().all())
            assert bool(gradient.any()) == busy
