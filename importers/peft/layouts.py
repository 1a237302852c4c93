"""How peft names and shapes a Mixtral's adapters, in both layouts, out of the mapping's table.

``v4`` has one pair of matrices per projection and expert, named after a released Mixtral's tensors. peft loads it under
transformers 4 and 5, vLLM takes no other. ``v5`` follows transformers 5's memory, where a layer's experts are one
parameter; with r the rank, E experts and ``gate_up_proj`` [E, 2F, H] (``down_proj`` [E, H, F] likewise):

    A [E * r, H]    expert by expert: row e * r + k is expert e's k-th
    B [2F, r * E]   experts next to each other: column k * E + e is expert e's k-th

Sources: peft 0.21 `tuners/lora/layer.py`, ParamWrapper.get_delta_weight, and `utils/transformers_weight_conversion.py`.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from mixtral_recipes.importers.convert.stored_adapters import LowRank, StoredAdapters
from mixtral_recipes.importers.mapping import FUSED, WEIGHTS, Weight, canonical_sources, instances, shape_of
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import LoRA

Layout = Literal["v4", "v5"]
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

Read = Callable[[str], LowRank | None]  # a layer's adapter by the mapping's name for it; None where there is none


def per_projection(read: Read, dims: ModelShape, *, experts: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The v4 layout: (name, tensor) of every factor, A shared by q, k and v (and by gate and up) written for each.

    Where only the experts' first projection is adapted, the second has zeros: under transformers 5 peft stacks both in
    one module, and takes what it does not find inside of another for none.

    Args:
        read: Gives a layer's adapter.
        dims: The model's sizes.
        experts: Whether the experts' adapters are wanted too.
    """
    sources = canonical_sources(dims)
    first: LowRank | None = None  # of the experts' first projection
    for weight in _adaptable():
        if weight.per_expert and not experts:
            continue
        adapters = {place: read(_layer_name(weight, *place)) for place in instances(weight, dims)}
        like = next((adapter for adapter in adapters.values() if adapter is not None), None)
        if weight.per_expert and like is None and first is not None:
            rows, columns = shape_of(weight.shapes[0], dims)
            rank = first.a.shape[0]
            like = LowRank(torch.zeros(rank, columns), torch.zeros(rows, rank), first.scale)
        first = like if weight.per_expert else None
        for (layer, expert), adapter in adapters.items():
            if adapter is None and weight.per_expert and like is not None:
                adapter = _nothing(like)  # peft and vLLM stack a layer's experts, and want all of them
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


def _nothing(like: LowRank) -> LowRank:
    """An adapter of zeros, of another's shapes."""
    return LowRank(torch.zeros_like(like.a), torch.zeros_like(like.b), like.scale)


def whole(stored: StoredAdapters, dims: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what was trained whole, without the rows that pad the vocabulary."""
    for weight in WEIGHTS:
        rows = stored.whole(weight.disk)
        if rows is not None:
            yield PREFIX + weight.hf[0], stored.read_whole(weight.disk)[: dims.vocab_size]


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
            # Two parameters of one module: peft wraps it once for each, and the first ends up inside the second.
            inside = ".base_layer" * (len(found) - 1 - position)
            key = PREFIX + name.rsplit(".", 1)[0] + inside
            a, b = _stack(adapters)
            yield key + A, a
            yield key + B, b


def unstack(a: Tensor, b: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Each expert's A and B out of the v5 layout's; the inverse of what `fused` writes."""
    dim = a.shape[0] // experts
    by_expert = b.reshape(b.shape[0], dim, experts)
    return [(a[e * dim : (e + 1) * dim], by_expert[:, :, e].contiguous()) for e in range(experts)]


def _stack(adapters: list[LowRank | None]) -> tuple[Tensor, Tensor]:
    like = next(adapter for adapter in adapters if adapter is not None)
    whole = [adapter or _nothing(like) for adapter in adapters]
    return torch.cat([one.a for one in whole]), torch.stack([one.b for one in whole], dim=-1).flatten(1)


def targets(scheme: LoRA, layout: Layout) -> dict[str, str]:
    """What peft knows each adapted kind of weight by -> the Megatron layer it belongs to.

    Of v4 a projection (``q_proj``, ``w1``; ``w2`` also where `per_projection` writes zeros for it, under the first
    projection's settings); of v5 for the experts a parameter (``mlp.experts.gate_up_proj``).
    """
    wanted = scheme.targets()
    alone = layout == "v4" and "linear_fc1" in wanted and "linear_fc2" not in wanted
    named_by = (
        {weight.hf: name.split(".", 3)[-1] for name, weight in _fused_weights().items()} if layout == "v5" else {}
    )
    found = {}
    for weight in _adaptable():
        layer = _layer_name(weight, 0, 0).rsplit(".", 1)[-1]
        if layer in wanted:
            names = [named_by[weight.hf]] if weight.hf in named_by else [name.split(".")[-2] for name in weight.hf]
            found |= dict.fromkeys(names, layer)
        elif alone and layer == "linear_fc2":
            found |= dict.fromkeys([name.split(".")[-2] for name in weight.hf], "linear_fc1")
    return found


def exact(name: str, kind: str, scheme: LoRA, dims: ModelShape) -> list[str]:
    """A target of `targets` as peft is to find it: layer by layer, where only some layers are adapted.

    Of the experts' projections (v4) all layers are named and written, since under transformers 5 peft stacks them
    whatever ``layers_to_transform`` says; what is not adapted has zeros.

    Args:
        name: What peft knows it by.
        kind: The Megatron layer it belongs to.
        scheme: What was trained.
        dims: The model's sizes.
    """
    weight = next(weight for weight in _adaptable() if _layer_name(weight, 0, 0).endswith(kind))
    if weight.per_expert and "." not in name:
        return [name]
    places = instances(weight, dims)
    layers = sorted({int(layer or 0) for layer, expert in places if scheme.adapts(_layer_name(weight, layer, expert))})
    if len(layers) == dims.num_layers:
        return [name]
    return [f"layers.{layer}.{name if '.' in name else f'self_attn.{name}'}" for layer in layers]


def _adaptable() -> Iterator[Weight]:
    return (weight for weight in WEIGHTS if weight.adapted)


def _fused_weights() -> dict[str, Weight]:
    """Fused parameter -> the table's row whose adapters are stacked in it."""
    by_parts = {weight.hf: weight for weight in _adaptable()}
    return {name: by_parts[parts] for name, parts in FUSED.items() if parts in by_parts}


def _layer_name(weight: Weight, layer: int | None, expert: int | None) -> str:
    assert weight.adapted is not None
    return weight.adapted.format(layer=layer, expert=expert)
