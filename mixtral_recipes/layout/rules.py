"""The rules of a layout; a broken one is reported with the values that would work."""

import dataclasses
from collections.abc import Iterator

from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology, divisors, sizes, token_slices


def violations(layout: Topology, model: ModelShape, batch: BatchShape) -> list[str]:
    """Every rule a layout breaks, each as ``setting=value: the rule; the nearest values that work``."""
    wrong = [*_size_rules(layout, batch), *shape_violations(model)]
    layout, model, batch = _at_least_one(layout), _at_least_one(model), _at_least_one(batch)
    return [*wrong, *_world_rules(layout), *_model_rules(layout, model), *_batch_rules(layout, model, batch)]


def _at_least_one[T: (Topology, ModelShape, BatchShape)](value: T) -> T:
    """The same with sizes below 1 read as 1, so that the other rules can still be checked."""
    low = {
        field.name: 1
        for field in dataclasses.fields(value)
        if isinstance(size := getattr(value, field.name), int) and not isinstance(size, bool) and size < 1
    }
    return dataclasses.replace(value, **low)


def _choices(numbers: list[int]) -> str:
    """``use 1, 2, 4 or 8``."""
    words = [str(n) for n in numbers]
    return "use " + (words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1])


def _size_rules(t: Topology, b: BatchShape) -> Iterator[str]:
    counted = [("world size", t.world_size), *sizes(t)]
    counted += [(name, getattr(b, name)) for name in ("global_batch_size", "micro_batch_size", "seq_length")]
    for name, size in counted:
        if size < 1:
            yield f"{name}={size} must be at least 1."


def shape_violations(m: ModelShape) -> Iterator[str]:
    """Every rule that a model's sizes break by themselves, whatever the layout."""
    for name in ("vocab_size", "make_vocab_size_divisible_by"):
        if (size := getattr(m, name)) < 1:
            yield f"{name}={size} must be at least 1."
    heads, groups = m.num_attention_heads, m.num_query_groups
    if heads < 1 or groups < 1:
        return  # the range of a recipe's numbers says so
    if heads % groups:
        yield f"num_query_groups={groups} does not divide num_attention_heads={heads}."
    if m.head_dim < 1 or m.head_dim % 2:
        size = f"kv_channels={m.kv_channels}" if m.kv_channels else f"hidden_size / num_attention_heads = {m.head_dim}"
        yield f"{size}, the size of an attention head, must be even and at least 2: it is rotated in pairs."


def _world_rules(t: Topology) -> Iterator[str]:
    if t.world_size % t.model_ranks:
        yield (
            f"world size {t.world_size} (num_nodes x devices) is not a multiple of TP x PP x CP = "
            f"{t.tensor_model_parallel_size} x {t.pipeline_model_parallel_size} x {t.context_parallel_size} = "
            f"{t.model_ranks}."
        )
    if t.world_size % t.expert_ranks:
        yield (
            f"world size {t.world_size} is not a multiple of expert TP x EP x PP = {t.expert_tp} x "
            f"{t.expert_model_parallel_size} x {t.pipeline_model_parallel_size} = {t.expert_ranks}."
        )


def _model_rules(t: Topology, m: ModelShape) -> Iterator[str]:
    tp, pp, ep = t.tensor_model_parallel_size, t.pipeline_model_parallel_size, t.expert_model_parallel_size
    vpp = t.virtual_pipeline_model_parallel_size
    if m.num_moe_experts % ep:
        yield (
            f"expert_model_parallel_size={ep} does not divide num_moe_experts={m.num_moe_experts}; "
            f"{_choices(divisors(m.num_moe_experts))}."
        )
    if m.num_attention_heads % tp:
        yield f"tensor_model_parallel_size={tp} does not divide num_attention_heads={m.num_attention_heads}."
    if m.num_query_groups % tp:
        yield (
            f"tensor_model_parallel_size={tp} does not divide num_query_groups={m.num_query_groups}; "
            f"{_choices(divisors(m.num_query_groups))}."
        )
    if m.ffn_hidden_size % t.expert_tp:
        yield f"expert_tensor_parallel_size={t.expert_tp} does not divide ffn_hidden_size={m.ffn_hidden_size}."
    if vpp is not None and pp == 1:
        yield f"virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1; set it to None."
    elif m.num_layers % (pp * (vpp or 1)):
        yield (
            f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {pp} x {vpp or 1} does not divide "
            f"num_layers={m.num_layers}."
        )
    if tp > 1 and not t.sequence_parallel:
        yield (
            f"tensor_model_parallel_size={tp} needs sequence_parallel=True in Megatron's MoE layer; set "
            "sequence_parallel=True."
        )
    if t.sequence_parallel and tp == 1:
        yield "sequence_parallel=True needs tensor_model_parallel_size > 1; set it to False."


def _batch_rules(t: Topology, m: ModelShape, b: BatchShape) -> Iterator[str]:
    slices = token_slices(t)
    if b.seq_length % slices:
        yield (
            f"seq_length={b.seq_length} is not a multiple of {slices} (2 x CP if CP > 1, times TP with sequence "
            "parallelism)."
        )
    if b.fp8:
        yield from _fp8_rules(t, m, b)
    if b.seq_length > m.max_position_embeddings:
        yield (
            f"seq_length={b.seq_length} exceeds max_position_embeddings={m.max_position_embeddings}; "
            "raise model.config.max_position_embeddings or shorten data.seq_length."
        )
    if b.packed and b.micro_batch_size != 1:
        yield f"packed sequences need micro_batch_size=1, not {b.micro_batch_size}."
    if t.world_size % t.model_ranks == 0:
        step = b.micro_batch_size * t.data_parallel_size
        if b.global_batch_size % step:
            up = -(-b.global_batch_size // step) * step
            yield (
                f"global_batch_size={b.global_batch_size} is not a multiple of micro_batch_size x data-parallel size = "
                f"{b.micro_batch_size} x {t.data_parallel_size}; use {up}."
            )
        elif t.virtual_pipeline_model_parallel_size and t.num_microbatches(b) % t.pipeline_model_parallel_size:
            yield (
                f"interleaved pipelining needs microbatches per step ({t.num_microbatches(b)}) to be a multiple of "
                f"pipeline_model_parallel_size={t.pipeline_model_parallel_size}."
            )


def _fp8_rules(t: Topology, m: ModelShape, b: BatchShape) -> Iterator[str]:
    """FP8 matrix products need every dimension in multiples of 16 (Transformer Engine)."""
    slices = token_slices(t)
    if (b.seq_length * b.micro_batch_size) % (16 * slices):
        yield f"FP8 needs a multiple of 16 tokens per rank; seq_length={b.seq_length} over {slices} slices is not one."
    if m.ffn_hidden_size % (16 * t.expert_tp):
        yield (
            f"FP8 needs a multiple of 16 rows per rank; ffn_hidden_size={m.ffn_hidden_size} over "
            f"expert_tensor_parallel_size={t.expert_tp} is not one."
        )
    rows = m.head_dim * (m.num_attention_heads + 2 * m.num_query_groups)
    if rows % (16 * t.tensor_model_parallel_size) or m.hidden_size % 16:
        yield (
            f"FP8 needs a multiple of 16 rows per rank; attention's {rows} rows over "
            f"tensor_model_parallel_size={t.tensor_model_parallel_size} are not one."
        )
