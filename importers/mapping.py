"""The one table that relates Megatron's weights to Hugging Face's; import, export and verify all read it.

Five layouts meet here, and in all of them a tensor is a run of whole rows of **canonical tensors**, the ones a released
Mixtral's files hold ("v4": one tensor per expert and projection):

- v4 itself;
- v5, transformers' in-memory layout, where a layer's experts are one fused tensor (`FUSED`);
- Megatron's, on disk (`torch_dist`: layers stacked on axis 0, experts on axis 1) and in memory;
- Mistral's own (`consolidated.*`), with other names, the rows of query and key heads in another order, and in the first
  release of 8x7B a layer's experts stacked, the last projection transposed (`MISTRAL_STACKED`);
- llama.cpp's (GGUF), with query and key rows in Mistral's order and a layer's experts stacked.

So one description serves both directions: `StoredParts` says which canonical tensors a file's tensor is made of, and
`Block` which rows of them come next in one of Megatron's.

Dimension letters: V vocabulary, H hidden size, Q query width (heads x head dim), K key width (KV groups x head dim),
D head dim, F expert width, E experts, L layers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mixtral_recipes.layout.shapes import ModelShape

Transform = Literal["copy", "stack", "qkv"]
Order = Literal["rows", "interleaved", "transposed"]


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
        disk: Key in a torch_dist checkpoint. Transformer Engine's spelling of the fused norm, under either layer spec.
        hf: Canonical tensor names, in the order the transform takes them.
        shapes: Their shapes in dimension letters, in the same order.
        mistral: Their names in Mistral's own files, in the same order.
        gguf: Their names in llama.cpp's files, in the same order; experts of one name are stacked.
        transform: How their rows make up the Megatron tensor; `merge_blocks` says exactly.
        extra_state: Key of the additional state that Transformer Engine's module stores beside this weight.
        adapted: The layer's name, where adapters can be attached to it (`peft/names.py` makes their keys of it).
        local: Its key where Megatron-LM's own layers saved it, those of ``--transformer-impl local``, if it is another.
    """

    disk: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    mistral: tuple[str, ...]
    gguf: tuple[str, ...]
    transform: Transform = "copy"
    extra_state: str | None = None
    adapted: str | None = None
    local: str | None = None

    @property
    def per_layer(self) -> bool:
        return self.disk.startswith("decoder.layers.")

    @property
    def per_expert(self) -> bool:
        return ".experts." in self.disk


_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_MOE = _HF + "block_sparse_moe."
_MISTRAL = "layers.{layer}."
_MISTRAL_EXPERT = _MISTRAL + "feed_forward.experts.{expert}."
_GGUF = "blk.{layer}."

# Sources: Megatron-Core 0.19 GPTModel.sharded_state_dict(); transformers MixtralForCausalLM; mistral-inference
# transformer.py, Transformer; gguf constants.py, TENSOR_NAMES.
WEIGHTS: tuple[Weight, ...] = (
    Weight(
        disk="embedding.word_embeddings.weight",
        hf=("model.embed_tokens.weight",),
        shapes=("V H",),
        mistral=("tok_embeddings.weight",),
        gguf=("token_embd.weight",),
    ),
    Weight(
        disk="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        hf=(_HF + "input_layernorm.weight",),
        shapes=("H",),
        mistral=(_MISTRAL + "attention_norm.weight",),
        gguf=(_GGUF + "attn_norm.weight",),
    ),
    Weight(
        disk="decoder.layers.self_attention.linear_qkv.weight",
        hf=(_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        shapes=("Q H", "K H", "K H"),
        mistral=(_MISTRAL + "attention.wq.weight", _MISTRAL + "attention.wk.weight", _MISTRAL + "attention.wv.weight"),
        gguf=(_GGUF + "attn_q.weight", _GGUF + "attn_k.weight", _GGUF + "attn_v.weight"),
        transform="qkv",
        extra_state="decoder.layers.self_attention.linear_qkv._extra_state",
        adapted=_LAYER + "self_attention.linear_qkv",
    ),
    Weight(
        disk="decoder.layers.self_attention.linear_proj.weight",
        hf=(_HF + "self_attn.o_proj.weight",),
        shapes=("H Q",),
        mistral=(_MISTRAL + "attention.wo.weight",),
        gguf=(_GGUF + "attn_output.weight",),
        extra_state="decoder.layers.self_attention.linear_proj._extra_state",
        adapted=_LAYER + "self_attention.linear_proj",
    ),
    Weight(
        disk="decoder.layers.pre_mlp_layernorm.weight",
        hf=(_HF + "post_attention_layernorm.weight",),
        shapes=("H",),
        mistral=(_MISTRAL + "ffn_norm.weight",),
        gguf=(_GGUF + "ffn_norm.weight",),
        extra_state="decoder.layers.pre_mlp_layernorm._extra_state",
        local="decoder.layers.mlp.linear_fc1.layer_norm_weight",
    ),
    Weight(
        disk="decoder.layers.mlp.router.weight",
        hf=(_MOE + "gate.weight",),
        shapes=("E H",),
        mistral=(_MISTRAL + "feed_forward.gate.weight",),
        gguf=(_GGUF + "ffn_gate_inp.weight",),
    ),
    Weight(
        disk="decoder.layers.mlp.experts.experts.linear_fc1.weight",
        hf=(_MOE + "experts.{expert}.w1.weight", _MOE + "experts.{expert}.w3.weight"),  # gate over up
        shapes=("F H", "F H"),
        mistral=(_MISTRAL_EXPERT + "w1.weight", _MISTRAL_EXPERT + "w3.weight"),
        gguf=(_GGUF + "ffn_gate_exps.weight", _GGUF + "ffn_up_exps.weight"),
        transform="stack",
        extra_state="decoder.layers.mlp.experts.experts.linear_fc1._extra_state",
        adapted=_LAYER + "mlp.experts.{expert}.linear_fc1",
    ),
    Weight(
        disk="decoder.layers.mlp.experts.experts.linear_fc2.weight",
        hf=(_MOE + "experts.{expert}.w2.weight",),
        shapes=("H F",),
        mistral=(_MISTRAL_EXPERT + "w2.weight",),
        gguf=(_GGUF + "ffn_down_exps.weight",),
        extra_state="decoder.layers.mlp.experts.experts.linear_fc2._extra_state",
        adapted=_LAYER + "mlp.experts.{expert}.linear_fc2",
    ),
    Weight(
        disk="decoder.final_layernorm.weight",
        hf=("model.norm.weight",),
        shapes=("H",),
        mistral=("norm.weight",),
        gguf=("output_norm.weight",),
        extra_state="decoder.final_layernorm._extra_state",
    ),
    Weight(
        disk="output_layer.weight",
        hf=("lm_head.weight",),
        shapes=("V H",),
        mistral=("output.weight",),
        gguf=("output.weight",),
    ),
)

# transformers 5 in memory: fused name -> the canonical tensors stacked in it, for every expert in turn; and a renaming.
FUSED: dict[str, tuple[str, ...]] = {
    _HF + "mlp.gate.weight": (_MOE + "gate.weight",),
    _HF + "mlp.experts.gate_up_proj": (_MOE + "experts.{expert}.w1.weight", _MOE + "experts.{expert}.w3.weight"),
    _HF + "mlp.experts.down_proj": (_MOE + "experts.{expert}.w2.weight",),
}

# Mistral's code and llama.cpp turn neighbouring rows of a head, not its halves (`views.TurnedHeads`).
INTERLEAVED = frozenset({_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight"})

# Mistral's first release of 8x7B (consolidated.00.pt to .07.pt): a layer's experts one below the other, [E x F, H];
# the last projection, [H, F], transposed so that it fits. Source: transformers convert_mixtral_weights_to_hf.py.
MISTRAL_STACKED: dict[str, tuple[str, Order]] = {
    _MISTRAL + "block_sparse_moe.gate.weight": (_MOE + "gate.weight", "rows"),
    _MISTRAL + "block_sparse_moe.w1": (_MOE + "experts.{expert}.w1.weight", "rows"),
    _MISTRAL + "block_sparse_moe.w2": (_MOE + "experts.{expert}.w2.weight", "transposed"),
    _MISTRAL + "block_sparse_moe.w3": (_MOE + "experts.{expert}.w3.weight", "rows"),
}


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` of the canonical tensor ``name``."""

    name: str
    start: int
    stop: int


def shape_of(shape: str, dims: ModelShape) -> tuple[int, ...]:
    """Sizes of a shape written in dimension letters."""
    sizes = {
        "V": dims.vocab_size,
        "H": dims.hidden_size,
        "Q": dims.num_attention_heads * dims.head_dim,
        "K": dims.num_query_groups * dims.head_dim,
        "F": dims.ffn_hidden_size,
        "E": dims.num_moe_experts,
    }
    return tuple(sizes[letter] for letter in shape.split())


def instances(weight: Weight, dims: ModelShape) -> Iterator[tuple[int | None, int | None]]:
    """Every (layer, expert) a table row exists for; None where the axis does not apply."""
    layers = range(dims.num_layers) if weight.per_layer else (None,)
    experts = range(dims.num_moe_experts) if weight.per_expert else (None,)
    return ((layer, expert) for layer in layers for expert in experts)


def names_of(weight: Weight, dims: ModelShape) -> list[str]:
    """Every canonical tensor that a table row has rows of."""
    return [name.format(layer=layer, expert=expert) for layer, expert in instances(weight, dims) for name in weight.hf]


def canonical_tensors(dims: ModelShape) -> Iterator[tuple[str, int | None, int | None, tuple[int, ...]]]:
    """(name with braces, layer, expert, shape) of every canonical tensor, in table order, layer by layer."""
    for per_layer, group in itertools.groupby(WEIGHTS, key=lambda weight: weight.per_layer):
        rows = list(group)
        for layer in range(dims.num_layers) if per_layer else (None,):
            for weight in rows:
                for expert in range(dims.num_moe_experts) if weight.per_expert else (None,):
                    for template, shape in zip(weight.hf, weight.shapes, strict=True):
                        yield template, layer, expert, shape_of(shape, dims)


def canonical_shapes(dims: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in the v4 layout, as `canonical_tensors` orders them."""
    return {
        template.format(layer=layer, expert=expert): shape for template, layer, expert, shape in canonical_tensors(dims)
    }


@dataclass(frozen=True)
class StoredParts:
    """A tensor of a layout: its shape, the canonical tensors one below the other in it, and their order."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    order: Order


def hf_tensors(dims: ModelShape, *, fused: bool) -> dict[str, StoredParts]:
    """The v4 layout, or the v5 one (``fused``), by name, in the order `canonical_shapes` has."""
    names = {name: name for weight in WEIGHTS for name in weight.hf}
    if fused:
        names |= {part: target for target, parts in FUSED.items() for part in parts}
    return _stored(dims, names, {}, expert_axis=True)


def mistral_tensors(dims: ModelShape, *, stacked: bool) -> dict[str, StoredParts]:
    """Mistral's own layout, likewise.

    Args:
        dims: The model's sizes.
        stacked: Whether a layer's experts are stacked, as in the first release.
    """
    names = {hf: own for weight in WEIGHTS for hf, own in zip(weight.hf, weight.mistral, strict=True)}
    orders: dict[str, Order] = dict.fromkeys(INTERLEAVED, "interleaved")
    if stacked:
        names |= {part: stored for stored, (part, _) in MISTRAL_STACKED.items()}
        orders |= dict(MISTRAL_STACKED.values())
    return _stored(dims, names, orders, expert_axis=False)


def gguf_tensors(dims: ModelShape) -> dict[str, StoredParts]:
    """llama.cpp's layout, likewise."""
    names = {hf: own for weight in WEIGHTS for hf, own in zip(weight.hf, weight.gguf, strict=True)}
    return _stored(dims, names, dict.fromkeys(INTERLEAVED, "interleaved"), expert_axis=True)


def _stored(
    dims: ModelShape, names: dict[str, str], orders: dict[str, Order], *, expert_axis: bool
) -> dict[str, StoredParts]:
    """A layout from its names, by canonical ones; tensors and experts of one name stand one below the other.

    Args:
        dims: The model's sizes.
        names: Canonical names -> the layout's.
        orders: Canonical names -> how their rows are stored; in order where nothing is said.
        expert_axis: Whether experts of one name have an axis of their own.
    """
    found: dict[str, StoredParts] = {}
    for template, layer, expert, shape in canonical_tensors(dims):
        target = names[template].format(layer=layer, expert=expert)
        if target in found:
            continue
        together = expert is not None and "{expert}" not in names[template]
        parts = [part for part, name in names.items() if name == names[template]]
        experts = range(dims.num_moe_experts) if together else (expert,)
        order = orders.get(template, "rows")
        rows, *columns = reversed(shape) if order == "transposed" else shape
        rows *= len(parts)
        found[target] = StoredParts(
            (len(experts), rows, *columns) if together and expert_axis else (rows * len(experts), *columns),
            tuple(part.format(layer=layer, expert=number) for number in experts for part in parts),
            order,
        )
    return found


def merge_blocks(weight: Weight, dims: ModelShape, layer: int | None, expert: int | None) -> list[Block]:
    """The canonical rows that make up one Megatron tensor (one layer, one expert), top to bottom.

    ``qkv`` interleaves per KV group: the group's query rows, its key rows, its value rows.

    Source: Megatron-Core `transformer/attention.py`, SelfAttention.get_query_key_value_tensors.
    """
    names = [name.format(layer=layer, expert=expert) for name in weight.hf]
    rows = [shape_of(shape, dims)[0] for shape in weight.shapes]
    if weight.transform != "qkv":
        return [Block(name, 0, count) for name, count in zip(names, rows, strict=True)]
    groups = dims.num_query_groups
    return [
        Block(name, group * count // groups, (group + 1) * count // groups)
        for group in range(groups)
        for name, count in zip(names, rows, strict=True)
    ]


def disk_shape(weight: Weight, dims: ModelShape) -> tuple[int, ...]:
    """Shape of a table row's tensor in a torch_dist checkpoint."""
    shapes = [shape_of(shape, dims) for shape in weight.shapes]
    rows = sum(shape[0] for shape in shapes)
    stacked = (dims.num_layers,) * weight.per_layer + (dims.num_moe_experts,) * weight.per_expert
    return (*stacked, rows, *shapes[0][1:])


def canonical_sources(dims: ModelShape) -> dict[str, tuple[Weight, int | None, int | None, list[tuple[int, int]]]]:
    """The inverse of `merge_blocks`: where each canonical tensor's rows lie in Megatron's.

    Returns:
        name -> (table row, layer, expert, [(first row, row after the last), ...] in the canonical tensor's order).
    """
    found: dict[str, tuple[Weight, int | None, int | None, list[tuple[int, int]]]] = {}
    for weight in WEIGHTS:
        for layer, expert in instances(weight, dims):
            row = 0
            for block in merge_blocks(weight, dims, layer, expert):
                count = block.stop - block.start
                ranges = found.setdefault(block.name, (weight, layer, expert, []))[3]
                ranges.append((row, row + count))
                row += count
    return found
