"""Time of one training step, part by part: products, attention, what is bound by memory, links, pipeline, optimizer.

Every constant is shared by all models, layouts and jobs, and stands here or in `cards.py`. docs/reference/planner.md
says which rows each was fitted on.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

from mixtral_recipes.layout.cards import Card
from mixtral_recipes.planner.activations import Sizes
from mixtral_recipes.planner.weights import Part, buffers, held
from mixtral_recipes.planner.workload import Workload

# Work beyond an even share of the busiest expert without token drop. Fitted on ModelZoo's pair of rows with and
# without drop.
_IMBALANCE = 1.06
# Of the peak, what fused attention reaches forward and backward (its backward pass does 2.5 times the products).
# FlashAttention 3's paper (arXiv 2407.08608, figures 5 and 6, causal, head dim 128): 0.55 and 0.45 of 989.
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 0.55, 0.45
# Of the memory's bandwidth, what elementwise kernels and Adam reach.
STREAM = 0.72
# Of the links' bandwidth, what collectives reach: all-to-all among uneven shares, and the rings of the others.
_ALL_TO_ALL, _RING = 0.65, 0.75
# Elements of a result that one multiprocessor computes at once. All of them work on as many tiles; the last round is
# half empty on average.
_TILE = 128 * 256
# Of the shorter of a product's two times, computing and moving its matrices, what the other does not hide. Fitted on
# our full fine-tuning rows, whose experts have 1,024 rows each.
_UNHIDDEN = 0.6
# Bytes for each trained weight and microbatch: its gradient is added to the fp32 buffer (4 read, 4 written), by the
# product itself; or it is written in 16 bits, read, and added by a kernel of its own.
_FUSED_GRADIENT, _GRADIENT = 8, 12
# Bytes for each quantized weight and use, beside those read: written in 16 bits, and little else.
_DEQUANTIZED = 2.1
# Elementwise work without fused kernels, over that with them.
_UNFUSED = 2.75
# Starting a collective, and starting and ending a product.
_LATENCY_S = 12e-6
_PRODUCT_S = 4e-6
# Of the sends between interleaved stages, what is not hidden.
_OVERLAPPED_SENDS = 0.3
# Passes over input and output that an adapter's thin products cost, forward and backward, and its small kernels, which
# take as long as a launch whatever their size. Fitted on our LoRA rows of 4,096 and 16,384 tokens.
_THIN, _ADAPTER_KERNELS = 8, 28
# Kernels of one layer, forward and backward.
_KERNELS = 300
# Of gradient reduction and weight gathering, what cannot be hidden behind computation.
_EXPOSED = 0.15
# Of the computation, what hides the gathering of fully sharded weights. Fitted on arXiv 2504.14960, table 3.
_HIDDEN_SHARDS = 0.5
# Lost to whatever waits for the slowest rank, for each doubling of the nodes.
_STRAGGLER = 0.005
# How far off the sum of all parts may be: four in five of the rows that no constant was fitted on are nearer, and
# releases of identical jobs differ by as much.
ERROR = 0.15


@dataclass(frozen=True)
class Time:
    """Seconds of a step by part; each on the rank that everything waits for.

    Attributes:
        products: Matrix products outside attention, recomputation and logits included.
        attention: Attention's own products.
        streaming: Norms, activations, permutation, quantisation: bound by memory.
        expert_links: All-to-all and expert-tensor collectives.
        tensor_links: Tensor-parallel collectives.
        context_links: Context-parallel collectives, where they outlast attention.
        pipeline_links: Sends between stages.
        bubble: Waiting for the pipeline to fill and drain.
        data_links: Gradient reduction and weight gathering that is not hidden.
        optimizer: Adam.
        host: What kernels are launched too slowly for.
        waiting: For the slowest rank.
    """

    products: float
    attention: float
    streaming: float
    expert_links: float
    tensor_links: float
    context_links: float
    pipeline_links: float
    bubble: float
    data_links: float
    optimizer: float
    host: float
    waiting: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(vars(self).values())

    @property
    def low(self) -> float:
        """The step, if the estimate is too long by `ERROR`."""
        return self.step * (1 - ERROR)

    @property
    def high(self) -> float:
        """The step, if the estimate is too short by `ERROR`."""
        return self.step * (1 + ERROR)

    def as_json(self) -> dict[str, float]:
        """Each part."""
        return {name: round(value, 5) for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class _Layer:
    """Seconds of one layer (or of the output layer) for one microbatch, forward and backward together."""

    products: float = 0.0
    attention: float = 0.0
    streaming: float = 0.0
    expert_links: float = 0.0
    tensor_links: float = 0.0
    context_links: float = 0.0
    kernels: float = 0.0


_PARTS = ("products", "attention", "streaming", "expert_links", "tensor_links", "context_links")


def of_job(job: Workload, card: Card) -> Time:
    """Time of a step on the rank that everything waits for."""
    t = job.topology
    pp, vpp = t.pipeline_model_parallel_size, t.virtual_pipeline_model_parallel_size or 1
    microbatches = max(t.num_microbatches(job.batch), 1)
    layers = job.shape.num_layers // pp
    layer, head = _layer(job, card), _head(job, card)
    parts = {name: layers * getattr(layer, name) + getattr(head, name) for name in _PARTS}
    device = sum(parts.values())
    kernels = (layers * layer.kernels + head.kernels) * card.launch_us * 1e-6
    host = max(kernels - device, 0.0)
    stage = device + host
    sends = _sends(job, card, vpp) if pp > 1 else 0.0
    bubble = (pp - 1) / vpp * (stage + sends)
    data, optimizer = _data_links(job, card, microbatches * stage, stage, bubble), _optimizer(job, card)
    busy = microbatches * (stage + sends) + bubble + data + optimizer
    return Time(
        **{name: microbatches * value for name, value in parts.items()},
        pipeline_links=microbatches * sends,
        bubble=bubble,
        data_links=data,
        optimizer=optimizer,
        host=microbatches * host,
        waiting=busy * _STRAGGLER * math.log2(max(t.world_size / card.linked, 1.0)),
    )


def _product(card: Card, m: float, n: float, k: float, *, fp8: bool = False, result: int = 2) -> float:
    """Seconds of one matrix product [m, k] x [k, n]: its operations, and what of its traffic they do not hide.

    Args:
        card: The card.
        m: Rows.
        n: Columns.
        k: Depth.
        fp8: Whether both matrices are in FP8.
        result: Bytes moved for each element of the result.
    """
    peak = card.fp8_tflops * card.fp8_share if fp8 and card.fp8_tflops else card.bf16_tflops * card.product_share
    rounded = m * n + card.multiprocessors * _TILE / 2
    computing = 2 * rounded * k / (peak * 1e12)
    moving = _stream(card, (m * k + k * n) * (1 if fp8 else 2) + m * n * result)
    return max(computing, moving) + _UNHIDDEN * min(computing, moving) + _PRODUCT_S


def _linear(job: Workload, card: Card, rows: float, width: float, depth: float, again: float) -> float:
    """Seconds of a linear layer [rows, depth] -> [rows, width] in one microbatch, forward and backward."""
    fp8 = bool(job.fp8_recipe)
    seconds = (1 + again) * _product(card, rows, width, depth, fp8=fp8) + _product(card, rows, depth, width, fp8=fp8)
    if job.trains_all:
        gradient = _FUSED_GRADIENT if job.wgrad_fusion else 2
        seconds += _product(card, width, depth, rows, fp8=fp8, result=gradient)
        if not job.wgrad_fusion:
            seconds += _stream(card, (_GRADIENT - 2) * width * depth)
    return seconds


def _stream(card: Card, moved: float) -> float:
    """Seconds to read and write so many bytes."""
    return moved / (card.memory_tbps * 1e12 * STREAM)


@functools.lru_cache(maxsize=8192)
def _layer(job: Workload, card: Card) -> _Layer:
    n, again = Sizes.of(job), _again(job)
    busy = 1.0 if job.capacity_factor else _IMBALANCE if job.topology.expert_ranks > 1 else 1.0
    experts = job.shape.num_moe_experts // job.topology.expert_model_parallel_size
    rows = n.R * busy / experts
    products = sum(
        _linear(job, card, n.T, width, depth, again.dense) for width, depth in ((n.q + 2 * n.kv, n.h), (n.h, n.q))
    ) + experts * sum(
        _linear(job, card, rows, width, depth, again.experts) for width, depth in ((2 * n.f, n.h), (n.h, n.f))
    )
    core = 2 * n.T * n.q * job.mean_length * 2 / 2 / (card.bf16_tflops * card.attention_share * 1e12)
    attention = core * ((1 + again.attention) / _ATTENTION_FORWARD + 2.5 / _ATTENTION_BACKWARD)
    forward = _stream(card, _streamed(job, n, busy))
    streaming = forward * (3 + again.dense * 0.4 + again.experts * 0.6)
    weights = n.h * (2 * n.q + 2 * n.kv) + experts * 3 * n.h * n.f
    streaming += _adapters(job, card, n, experts)
    if job.adapters and job.adapters.quantized:
        streaming += _stream(card, (job.adapters.bits / 8 + _DEQUANTIZED) * weights) * (2 + again.experts)
    return _Layer(
        products=products,
        attention=attention,
        streaming=streaming,
        expert_links=_expert_links(job, card, n) * (2 + again.experts),
        tensor_links=_tensor_links(job, card, n) * (2 + again.dense),
        context_links=_context_links(job, card, n, attention),
        kernels=_KERNELS * (1 + 0.4 * again.dense),
    )


@dataclass(frozen=True)
class _Again:
    """What share of a forward pass is done twice."""

    dense: float = 0.0
    attention: float = 0.0
    experts: float = 0.0


def _again(job: Workload) -> _Again:
    chosen, t = job.recompute, job.topology
    if chosen.granularity == "full":
        layers = job.shape.num_layers / (t.pipeline_model_parallel_size * (t.virtual_pipeline_model_parallel_size or 1))
        share = min(chosen.num_layers / layers, 1.0) if chosen.method == "block" else 1.0
        return _Again(share, share, share)
    if chosen.granularity == "selective":
        return _Again(
            attention=float("core_attn" in chosen.modules), experts=float(bool({"moe", "mlp"} & set(chosen.modules)))
        )
    return _Again()


def _head(job: Workload, card: Card) -> _Layer:
    """The output layer and the loss, on the last stage."""
    n, t = Sizes.of(job), job.topology
    rows = job.shape.padded_vocab_size(t.tensor_model_parallel_size) / t.tensor_model_parallel_size
    return _Layer(
        products=_product(card, n.T, rows, n.h)
        + _product(card, n.T, n.h, rows)
        + (_product(card, rows, n.h, n.T, result=_FUSED_GRADIENT) if job.trains_all else 0.0),
        streaming=_stream(card, n.T * rows * 24),
        tensor_links=_ring(card, n.T * n.h * job.dtype_bytes, t.tensor_model_parallel_size, 1) * 3,
        kernels=100,
    )


def _streamed(job: Workload, n: Sizes, busy: float) -> float:
    """Bytes that one layer's forward pass reads and writes outside products and attention."""
    b = job.dtype_bytes
    norms_and_sums = 10 * n.t * n.h
    rotation = 2 * n.T * (n.q + n.kv)
    sorting = n.t * n.h * 2 + n.R * busy * n.h * 4
    gate = n.R * busy * 3 * n.f
    moved = (norms_and_sums + rotation + sorting + gate) * b * (1 if job.fused else _UNFUSED)
    if job.fp8_recipe:  # each product's input is read and written once more, by row and by column
        moved += 4 * (n.T * (n.h + n.q) + n.R * busy * (n.h + n.f))
    if not job.fused_attention:
        moved += 6 * n.T * n.heads * job.batch.seq_length * b
    return moved


def _adapters(job: Workload, card: Card, n: Sizes, experts: int) -> float:
    """Seconds of low-rank products, forward and backward: they are too thin to be bound by anything but memory."""
    if job.adapters is None:
        return 0.0
    sides = {
        "linear_qkv": n.T * (n.h + n.q + 2 * n.kv),
        "linear_proj": n.T * (n.q + n.h),
        "linear_fc1": n.R * (n.h + 2 * n.f),
        "linear_fc2": n.R * (n.f + n.h),
    }
    numbers = {"linear_fc1": experts, "linear_fc2": experts}
    shares = {target: job.adapters.share_of(target, job.shape) for target in job.adapters.targets}
    moved = _THIN * job.dtype_bytes * sum(sides[target] * share for target, share in shares.items())
    kernels = _ADAPTER_KERNELS * sum(numbers.get(target, 1) * share for target, share in shares.items())
    return _stream(card, moved) + kernels * card.launch_us * 1e-6


def _reach(card: Card, inner: int, size: int) -> float:
    """Bandwidth between ranks of a group that are ``inner`` apart: a node's links, or the network's."""
    return card.link_gbps * 1e9 if inner * size <= card.linked else card.network_gbps * 1e9


def _ring(card: Card, whole: float, size: int, inner: int) -> float:
    """Seconds to gather (or to reduce and scatter) ``whole`` bytes over a group."""
    if size == 1:
        return 0.0
    return whole * (size - 1) / size / (_reach(card, inner, size) * _RING) + _LATENCY_S


def _expert_links(job: Workload, card: Card, n: Sizes) -> float:
    """A forward pass: dispatch and combine, and the gathering over expert-tensor ranks."""
    t, b = job.topology, job.dtype_bytes
    ep, etp = t.expert_model_parallel_size, t.expert_tp
    rows = n.t * job.topk * n.h * b * (job.capacity_factor or 1.0)
    seconds = 0.0
    if ep > 1:
        near = max(min(card.linked // etp, ep), 1)  # peers in the same node, itself included
        inside = rows * (near - 1) / ep / (card.link_gbps * 1e9)
        outside = rows * (ep - near) / ep / (card.network_gbps * 1e9)
        seconds += 2 * (max(inside, outside) / _ALL_TO_ALL + _LATENCY_S)
    return seconds + 2 * _ring(card, rows * etp, etp, 1)


def _tensor_links(job: Workload, card: Card, n: Sizes) -> float:
    """A forward pass: gather before attention, reduce and scatter after it."""
    return 2 * _ring(card, n.T * n.h * job.dtype_bytes, job.topology.tensor_model_parallel_size, 1)


def _context_links(job: Workload, card: Card, n: Sizes, attention: float) -> float:
    """Of keys and values of the other ranks, and their gradients back, what attention does not hide."""
    t = job.topology
    cp = t.context_parallel_size
    if cp == 1:
        return 0.0
    whole = 3 * _ring(card, n.T * 2 * n.kv * job.dtype_bytes * cp, cp, t.tensor_model_parallel_size)
    return max(whole - attention, whole / cp)  # the first part that arrives hides behind nothing


def _sends(job: Workload, card: Card, vpp: int) -> float:
    """What is seen of a microbatch's sends between stages, forward and backward."""
    n = Sizes.of(job)
    one = n.t * n.h * job.dtype_bytes / (card.network_gbps * 1e9 * _RING) + _LATENCY_S
    return 2 * vpp * one * (_OVERLAPPED_SENDS if vpp > 1 else 1.0)


def _data_links(job: Workload, card: Card, computing: float, stage: float, bubble: float) -> float:
    """What is seen of gradient reduction and weight gathering."""
    t = job.topology
    seconds = 0.0
    copies = t.data_parallel_size * t.context_parallel_size
    mine = held(Part.of(job, 0))
    weight = 1 if job.fp8_weights else job.dtype_bytes
    for size, numel in ((copies, mine.dense), (t.expert_data_parallel_size, mine.experts)):
        reduced, gathered = numel * job.grad_bytes, numel * weight
        inner = t.world_size // size // max(t.pipeline_model_parallel_size, 1)
        if job.sharded_weights:
            gathered *= 2 * max(t.num_microbatches(job.batch), 1)
            reduced *= max(t.num_microbatches(job.batch), 1) * 0.5  # in 16 bits
        seconds += _ring(card, reduced, size, inner) + _ring(card, gathered, size, inner)
    hidden = 0.0
    if job.sharded_weights:
        hidden = _HIDDEN_SHARDS * computing
    elif job.overlap_grad_reduce:
        hidden = stage + bubble
    return max(seconds - hidden, _EXPOSED * seconds)


def _optimizer(job: Workload, card: Card) -> float:
    """What a step does with gradients and weights once the microbatches are through.

    Adam reads the gradient, reads and writes weight and moments in fp32, and writes the weight in 16 bits; the norm
    reads the gradient. The whole buffer is divided by the number of tokens, and emptied for the next step.
    """
    found = buffers(job, 0)
    moved = 34 * sum(b.shard for b in found) + 3 * job.grad_bytes * sum(b.numel for b in found)
    return _stream(card, moved) + 200 * card.launch_us * 1e-6
