"""The weights a rank holds, tensor by tensor, and the memory that Megatron makes of them.

Counts are exact: the same tensors, the same padding, the same shares as Megatron-Core's
`optimizer/param_layout.py` and `optimizer/distrib_optimizer.py` (`_compute_per_buffer_param_layout`), which
tests compare.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.planner.workload import Adapters, Workload

# Bytes of a weight in NF4: 4 bits, one 8-bit scale for 64 weights, one fp32 scale for 256 of those (QLoRA, arXiv
# 2305.14314, section 3: 4.127 bits).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
INT8_BYTES = 1.0  # and 4 for each row of thousands


def quantized_bytes(adapters: Adapters) -> float:
    """Bytes of a quantized base's weight."""
    return NF4_BYTES if adapters.bits == 4 else INT8_BYTES


@dataclass(frozen=True)
class Weight:
    """One parameter tensor on a rank.

    Attributes:
        layer: ``embedding``, ``output``, ``norm``, ``router``, or one of Megatron's four linear layers.
        shape: Of this rank's part.
        expert: Whether it is one expert's, so that its copies are the expert-data-parallel ranks.
        adapter: Whether an adapter added it, or it is trained whole beside adapters.
    """

    layer: str
    shape: tuple[int, ...]
    expert: bool = False
    adapter: bool = False

    @functools.cached_property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def quantizable(self) -> bool:
        """Whether it is a matrix of a linear layer: kept in FP8 or 4 bits where that is asked for."""
        return self.layer.startswith("linear") and not self.adapter


def expert_parameters(shape: ModelShape) -> int:
    """Parameters of all experts of all layers."""
    return shape.num_layers * shape.num_moe_experts * 3 * shape.hidden_size * shape.ffn_hidden_size


def parameters(shape: ModelShape) -> int:
    """Parameters of the whole model."""
    h, kv, q = shape.hidden_size, shape.num_query_groups * shape.head_dim, shape.num_attention_heads * shape.head_dim
    layer = 2 * h * q + 2 * h * kv + shape.num_moe_experts * h + 2 * h
    vocabulary = 2 * shape.vocab_size * h
    return expert_parameters(shape) + shape.num_layers * layer + vocabulary + h


@dataclass(frozen=True)
class Part:
    """What decides which tensors a rank holds.

    Attributes:
        shape: The model.
        tp: Tensor-parallel size.
        pp: Pipeline size.
        vpp: Interleaved chunks, 1 without.
        ep: Expert-parallel size.
        etp: Expert-tensor-parallel size.
        adapters: Adapters; None trains all weights.
        grouped: Whether a layer's experts stand together (Transformer Engine).
        stage: Pipeline stage.
    """

    shape: ModelShape
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    adapters: Adapters | None
    grouped: bool
    stage: int

    @staticmethod
    def of(job: Workload, stage: int) -> "Part":
        """A stage's part of a job's model."""
        t = job.topology
        vpp = t.virtual_pipeline_model_parallel_size or 1
        sizes = (t.tensor_model_parallel_size, t.pipeline_model_parallel_size, vpp, t.expert_model_parallel_size)
        return Part(job.shape, *sizes, t.expert_tp, job.adapters, job.transformer_engine, stage)


@dataclass(frozen=True)
class Held:
    """A rank's tensors in sums.

    Attributes:
        plain: Elements of the base's tensors that stay in 16 bits whatever the matrices' format.
        matrices: Elements of the base's matrices.
        dense: Trained elements outside the experts.
        experts: Trained elements of the experts.
        largest: Elements of the largest matrix.
        kinds: Elements of one matrix of each shape.
    """

    plain: int
    matrices: int
    dense: int
    experts: int
    largest: int
    kinds: int


@dataclass(frozen=True)
class Chunk:
    """The tensors of one model chunk: what comes before its layers, one adapted layer, and what comes after them.

    Attributes:
        layers: How many layers it has.
        trained: How many of them have trained tensors: all, or those with adapters.
    """

    before: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    layers: int
    trained: int
    after: tuple[Weight, ...]

    def sizes(self, wanted: Callable[[Weight], bool]) -> list[int]:
        """Elements of each trained tensor that is wanted, in the order Megatron has them."""
        one = [w.numel for w in self.layer if wanted(w)]
        return [
            *(w.numel for w in self.before if wanted(w)),
            *one * self.trained,
            *(w.numel for w in self.after if wanted(w)),
        ]


def chunks(part: Part) -> list[Chunk]:
    """A pipeline stage's chunks; one without interleaving."""
    h, layer = part.shape.hidden_size, tuple(_layer(part))
    rows = part.shape.padded_vocab_size(part.tp) // part.tp
    trained = part.adapters.whole if part.adapters else ()
    first = (Weight("embedding", (rows, h), adapter="word_embeddings" in trained),)
    last = (Weight("norm", (h,)), Weight("output", (rows, h), adapter="output_layer" in trained))
    starts, ends = part.stage == 0, part.stage == part.pp - 1
    each = part.shape.num_layers // (part.pp * part.vpp)
    chosen = part.adapters.layers if part.adapters else None

    def trained_layers(number: int) -> int:
        first = (number * part.pp + part.stage) * each
        return each if chosen is None else sum(first <= layer < first + each for layer in chosen)

    return [
        Chunk(
            first if starts and number == 0 else (),
            layer,
            each,
            trained_layers(number),
            last if ends and number == part.vpp - 1 else (),
        )
        for number in range(part.vpp)
    ]


@functools.lru_cache(maxsize=4096)
def held(part: Part) -> Held:
    """A stage's tensors in sums."""
    found = chunks(part)
    layers, trained = sum(chunk.layers for chunk in found), sum(chunk.trained for chunk in found)
    numbers = {w: (trained if w.adapter else layers) * number for w, number in Counter(found[0].layer).items()}
    numbers = Counter(numbers) + Counter(w for chunk in found for w in (*chunk.before, *chunk.after))
    matrices = {w for w in found[0].layer if w.quantizable}

    def total(wanted: Callable[[Weight], bool]) -> int:
        return sum(number * w.numel for w, number in numbers.items() if wanted(w))

    return Held(
        plain=total(lambda w: not w.quantizable and not w.adapter),
        matrices=total(lambda w: w.quantizable),
        dense=total(lambda w: not w.expert and (part.adapters is None or w.adapter)),
        experts=total(lambda w: w.expert and (part.adapters is None or w.adapter)),
        largest=max((w.numel for w in matrices), default=0),
        kinds=sum(math.prod(shape) for shape in {w.shape for w in matrices}),
    )


def _layer(part: Part) -> Iterator[Weight]:
    s, adapters = part.shape, part.adapters
    h, tp, etp = s.hidden_size, part.tp, part.etp
    q, kv, f = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim, s.ffn_hidden_size
    norm, router = Weight("norm", (h,)), Weight("router", (s.num_moe_experts, h))
    local = s.num_moe_experts // part.ep
    with_adapters = local if adapters is None or adapters.experts is None else min(local, adapters.experts)
    plain = [Weight("linear_fc1", (2 * f // etp, h), expert=True), Weight("linear_fc2", (h, f // etp), expert=True)]
    fc1, fc2 = (list(_adapted(weight, adapters)) for weight in plain)
    left_out = local - with_adapters
    yield norm
    yield from _adapted(Weight("linear_proj", (h, q // tp)), adapters)
    yield from _adapted(Weight("linear_qkv", ((q + 2 * kv) // tp, h)), adapters)
    yield from (norm, router)
    if part.grouped:
        yield from fc1 * with_adapters + fc2 * with_adapters + plain * left_out
    else:
        yield from (fc1 + fc2) * with_adapters + plain * left_out


def _adapted(weight: Weight, adapters: Adapters | None) -> Iterator[Weight]:
    """A matrix and what its adapter adds: A [dim, in], B [out, dim], and with DoRA a length for each row."""
    yield weight
    if adapters and weight.layer in adapters.targets:
        rows, columns = weight.shape
        rank = adapters.rank_of(weight.layer)
        yield Weight(weight.layer, (rank, columns), weight.expert, adapter=True)
        yield Weight(weight.layer, (rows, rank), weight.expert, adapter=True)
        if adapters.magnitudes:
            yield Weight(weight.layer, (rows,), weight.expert, adapter=True)


@dataclass(frozen=True)
class Buffer:
    """Parameters that lie one behind the other, with their gradients, so that they are reduced together.

    Attributes:
        numel: Elements, padding included.
        shard: Elements whose optimizer state the first of the ranks that share it keeps.
    """

    numel: int
    shard: int


def buffers(job: Workload, stage: int, ranks: tuple[int, int] = (0, 0)) -> tuple[Buffer, ...]:
    """The gradient buffers of a stage's trained parameters, of all its chunks.

    Args:
        job: The job.
        stage: Pipeline stage.
        ranks: Whose share of the optimizer state: its number among the copies of the dense layers, and of the experts.
    """
    t = job.topology
    copies = (t.data_parallel_size * t.context_parallel_size, t.expert_data_parallel_size)
    return _buffers(Part.of(job, stage), copies, job.overlap_grad_reduce, job.distributed_optimizer, ranks)


@functools.lru_cache(maxsize=8192)
def _buffers(
    part: Part, copies: tuple[int, int], overlap: bool, shared: bool, ranks: tuple[int, int]
) -> tuple[Buffer, ...]:
    # Megatron's DDP cuts the first chunk of the first stage into buckets, if reductions are to overlap.
    bucket = max(40_000_000, 1_000_000 * copies[0]) if overlap and part.stage == 0 else None
    # Experts have buffers of their own where they are spread otherwise than the dense layers; their adapters always.
    apart = part.ep > 1 or part.etp != part.tp or part.adapters is not None
    found: list[Buffer] = []
    for number, chunk in enumerate(chunks(part)):
        for of_experts, size, rank in zip((False, True), copies, ranks, strict=True):

            def mine(w: Weight, of_experts: bool = of_experts) -> bool:
                return (w.expert and apart) == of_experts and (part.adapters is None or w.adapter)

            sizes = chunk.sizes(mine)
            if sizes:
                found.append(_buffer(sizes, bucket if number == 0 else None, size, rank, shared))
    return tuple(found)


def _buffer(sizes: Sequence[int], bucket: int | None, copies: int, rank: int, shared: bool) -> Buffer:
    """One buffer.

    Source: Megatron-Core 0.19 `DistributedOptimizer._compute_per_buffer_param_layout`.
    """
    if not shared:
        total = sum(sizes)
        return Buffer(total, total)
    unit = math.lcm(copies, 128)
    start = bucket_start = shard = 0
    spans: list[tuple[int, int]] = []
    for number, size in enumerate(reversed(sizes)):
        start = -(-start // 64) * 64
        spans.append((start, start + size))
        start += size
        if (bucket is not None and start - bucket_start >= bucket) or number == len(sizes) - 1:
            end = -(-start // unit) * unit
            share = (end - bucket_start) // copies
            shard += _overlap(spans, bucket_start + share * rank, bucket_start + share * (rank + 1))
            bucket_start = start = end
            spans = []
    return Buffer(bucket_start, shard)


def _overlap(spans: Sequence[tuple[int, int]], low: int, high: int) -> int:
    total = 0
    for start, end in spans:  # in order
        if start >= high:
            break
        total += max(0, min(end, high) - max(start, low))
    return total
