"""What is left out or done otherwise on a CPU gives Megatron's own numbers, bit for bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixtral_recipes.cpu import lazy_compile
from mixtral_recipes.cpu import speed as cpu_speed
from mixtral_recipes.models import experts


def test_rotary_embedding_and_its_gradient() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    megatrons = rope_utils._apply_rotary_pos_emb_bshd
    frequencies = torch.randn(16, 1, 1, 4, generator=torch.Generator().manual_seed(1))
    frequencies = torch.cat([frequencies, frequencies], dim=-1)
    for shape in ((16, 3, 4, 8), (16, 1, 2, 10)):  # all of a head rotated, and a part of it
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        found = []
        for apply in (megatrons, cpu_speed.in_halves(megatrons)):
            leaf = x.clone().requires_grad_()
            result = apply(leaf, frequencies, mscale=1.0)
            result.backward(gradient)
            found.append((result.detach(), leaf.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def test_a_collective_is_left_out_only_where_one_rank_would_copy_onto_itself() -> None:
    calls: list[Any] = []
    collective = cpu_speed.among_several(lambda *args, **named: calls.append((args, named)) or "work")
    buffer, other = torch.zeros(4), torch.zeros(4)
    alone, two = SimpleNamespace(size=lambda: 1), SimpleNamespace(size=lambda: 2)
    assert collective(buffer, buffer[:], group=alone, async_op=False) is None
    assert calls == []
    assert collective(buffer, other, group=alone) == "work"
    assert collective(buffer, buffer[:2], group=two, async_op=True) == "work"
    assert len(calls) == 2
    assert calls[1][1] == {"group": two, "async_op": True}


def test_scaling_is_in_place_where_source_and_target_are_one() -> None:
    sources = [torch.arange(3.0), torch.arange(4.0)]
    targets = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)]
    cpu_speed.multi_tensor_scale(0, None, [sources, targets], 0.3)
    assert all(torch.equal(t, (s * 0.3).bfloat16()) for s, t in zip(sources, targets, strict=True))
    expected = [s * 0.3 for s in sources]
    cpu_speed.multi_tensor_scale(0, None, [sources, sources], 0.3)
    assert all(torch.equal(s, e) for s, e in zip(sources, expected, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_compute_what_experts_one_by_one_do(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three experts, one of them without a token."""
    monkeypatch.setattr(lazy_compile, "_eager", True)
    draw = torch.Generator().manual_seed(0)
    counts = [4, 0, 3]
    x = torch.randn(7, 6, generator=draw).to(dtype)
    probs = torch.rand(7, generator=draw)
    fc1 = [torch.randn(10, 6, generator=draw).to(dtype) for _ in counts]
    fc2 = [torch.randn(6, 5, generator=draw).to(dtype) for _ in counts]
    gradient = torch.randn(7, 6, generator=draw).to(dtype)

    def one_by_one(x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        parts = []
        for rows, p, w1, w2 in zip(x.split(counts), probs.split(counts), weights[:3], weights[3:], strict=True):
            gate, up = F.linear(rows, w1).chunk(2, dim=-1)
            parts.append(F.linear((F.silu(gate) * up * p.unsqueeze(-1)).to(dtype), w2))
        return torch.cat(parts)

    def grouped(x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        gate_up = experts._GroupedLinear.apply(x, counts, *weights[:3])
        hidden = experts._activated(gate_up, probs.unsqueeze(-1), fused=fused)
        return experts._GroupedLinear.apply(hidden, counts, *weights[3:])

    found = []
    for compute in (one_by_one, grouped):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, probs, *fc1, *fc2)]
        result = compute(*leaves)
        result.backward(gradient)
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for expected, ours in zip(*found, strict=True):
        rounding = 1e-6 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding if fused else 1e-6)


def test_only_the_wanted_gradients_are_computed() -> None:
    x, frozen = torch.randn(3, 4), torch.randn(2, 4)
    trained = torch.randn(2, 4, requires_grad=True)
    experts._GroupedLinear.apply(x, [1, 2], frozen, trained).sum().backward()
    assert trained.grad is not None
    assert x.grad is None
    assert frozen.grad is None
