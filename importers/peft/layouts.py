"""How peft names and shapes a Mixtral's adapters, in both layouts, out of the mapping's table.

``v4`` has one pair of matrices per projection and expert, named after a released Mixtral's tensors. peft loads it under
transformers 4 and 5, vLLM takes no other. ``v5`` follows transformers 5's memory, where a layer's experts are one
parameter; with r the rank, E experts and ``gate_up_proj`` [E, 2F, H] (``down_proj`` [E, H, F] likewise):

    A [E * r, H]    expert by expert: row e * r + k is expert e's k-th
    B [2F, r * E]   experts next to each other: column k * E + e is expert e's k-th

Sources: peft 0.21 `tuners/lora/layer.py`, ParamWrapper.get_delta_weight, and `utils/transformers_weight_conversion.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixtral_recipes.importers.mapping import FUSED, WEIGHTS, Weight, canonical_sources, instances
from mixtral_recipes.layout.shapes import ModelShape

Layout = Literal["v4", "v5"]
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# transformers 5 holds a layer's experts in two parameters of one module. peft wraps that module once for each, and the
# wrapping that comes first ends up inside: in ``base_layer``.
FUSED_EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LowRank:
    """An adapter of one Megatron layer (and expert).

    Attributes:
        a: [dim, in].
        b: [out, dim]; of a gated ``linear_fc1`` the gate's rows, then the up projection's.
        magnitude: DoRA's row lengths [out]; None for LoRA.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


Read = Callable[[str], LowRank | None]  # a layer's adapter by the mapping's name for it; None where there is none


def per_projection(read: Read, dims: ModelShape, *, experts: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The v4 layout: (name, tensor) of every factor, A shared by q, k and v (and by gate and up) written for each.

    Args:
        read: Gives a layer's adapter.
        dims: The model's sizes.
        experts: Whether the experts' adapters are wanted too.
    """
    sources = canonical_sources(dims)
    for weight in _adaptable():
        if weight.per_expert and not experts:
            continue
        for layer, expert in instances(weight, dims):
            adapter = read(_layer_name(weight, layer, expert))
            if adapter is None:
                continue
            for template in weight.hf:
                name = template.format(layer=layer, expert=expert)
                rows = sources[name][3]
                key = PREFIX + name.removesuffix(".weight")
                yield key + A, adapter.a
                yield key + B, torch.cat([adapter.b[start:stop] for start, stop in rows])
                if adapter.magnitude is not None:
                    yield key + MAGNITUDE, torch.cat([adapter.magnitude[start:stop] for start, stop in rows])


def fused(read: Read, dims: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """The v5 layout: attention as in v4, a layer's experts together."""
    yield from per_projection(read, dims, experts=False)
    for layer in range(dims.num_layers):
        found: dict[str, list[LowRank | None]] = {}
        for template, weight in _fused_weights().items():
            adapters = [read(_layer_name(weight, layer, expert)) for expert in range(dims.num_moe_experts)]
            if any(adapters):
                found[template.format(layer=layer)] = adapters
        for position, (name, adapters) in enumerate(found.items()):
            inside = ".base_layer" * (len(found) - 1 - position)
            key = PREFIX + name.rsplit(".", 1)[0] + inside
            a, b = _stack(adapters)
            yield key + A, a
            yield key + B, b


def unstack(a: Tensor, b: Tensor, experts: int) -> list[LowRank]:
    """Each expert's factors out of the v5 layout's; the inverse of what `fused` writes."""
    dim = a.shape[0] // experts
    by_expert = b.reshape(b.shape[0], dim, experts)
    return [LowRank(a[e * dim : (e + 1) * dim], by_expert[:, :, e].contiguous()) for e in range(experts)]


def _stack(adapters: list[LowRank | None]) -> tuple[Tensor, Tensor]:
    like = next(adapter for adapter in adapters if adapter is not None)
    whole = [adapter or LowRank(torch.zeros_like(like.a), torch.zeros_like(like.b)) for adapter in adapters]
    return torch.cat([adapter.a for adapter in whole]), torch.stack([adapter.b for adapter in whole], dim=-1).flatten(1)


def modules(names: Mapping[str, Tensor] | list[str]) -> list[str]:
    """The last part of every module that per-projection keys name, sorted: q_proj, w1 and so on."""
    return sorted({name.removesuffix(A).rsplit(".", 1)[-1] for name in names if name.endswith(A)} - {"experts", "base_layer"})


def _adaptable() -> Iterator[Weight]:
    return (weight for weight in WEIGHTS if weight.adapted)


def _fused_weights() -> dict[str, Weight]:
    """Fused parameter -> the table's row whose adapters are stacked in it."""
    by_parts = {weight.hf: weight for weight in _adaptable()}
    return {name: by_parts[parts] for name, parts in FUSED.items() if parts in by_parts}


def _layer_name(weight: Weight, layer: int | None, expert: int | None) -> str:
    assert weight.adapted is not None
    return weight.adapted.format(layer=layer, expert=expert)
