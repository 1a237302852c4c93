"""What a layer keeps for its backward pass, module by module, in bytes on one rank.

Each entry is a tensor that the modules save (`models/layer_specs.py`; Megatron-Core 0.19; Transformer Engine 2.x), by
the names below. Shape letters: t tokens of this rank's slice of the sequence (sequence parallelism splits it), T tokens
inside the tensor-parallel layers, R rows that this rank's experts process, h hidden, q and kv width of queries and
keys, f expert width; all on this rank.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from mixtral_recipes.planner.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """Rows and widths on one rank, of one microbatch.

    Attributes:
        t: Tokens between the tensor-parallel layers.
        T: Tokens inside them.
        R: Rows the rank's experts process: each token once for each of its experts.
        h: Hidden size.
        q: Width of the rank's queries.
        kv: Width of the rank's keys (and values).
        f: Width of an expert on the rank.
        heads: Query heads on the rank.
    """

    t: float
    T: float
    R: float
    h: int
    q: float
    kv: float
    f: float
    heads: float

    @staticmethod
    def of(job: Workload) -> "Sizes":
        """A rank's sizes, the tokens spread evenly over the experts."""
        s, t = job.shape, job.topology
        tp, etp = t.tensor_model_parallel_size, t.expert_tp
        inside = job.batch.micro_batch_size * job.batch.seq_length / t.context_parallel_size
        between = inside / tp if t.sequence_parallel else inside
        return Sizes(
            t=between,
            T=inside,
            R=between * job.topk * etp * (job.capacity_factor or 1.0),
            h=s.hidden_size,
            q=s.num_attention_heads * s.head_dim / tp,
            kv=s.num_query_groups * s.head_dim / tp,
            f=s.ffn_hidden_size / etp,
            heads=s.num_attention_heads / tp,
        )


@dataclass(frozen=True)
class Saved:
    """One tensor kept for the backward pass.

    Attributes:
        module: Which module keeps it: norm, qkv, attention, proj, router, dispatch, experts, adapters.
        name: What it is.
        size: Bytes.
    """

    module: str
    name: str
    size: float


_DROPPED = {
    "core_attn": {("attention", "output"), ("attention", "statistics")},
    "layernorm": {("qkv", "input"), ("router", "input")},
    "moe_act": {("experts", "fc2 input")},
}
_MOE = ("router", "dispatch", "experts")


def _dropped(saved: Saved, modules: tuple[str, ...]) -> bool:
    """Whether selective recomputation of some modules drops a tensor."""
    if saved.module in _MOE and saved.name != "input" and {"moe", "mlp"} & set(modules):
        return True
    if (saved.module, saved.name) == ("attention", "output") and "core_attn" in modules:
        return False  # the projection keeps it as its own input
    return any((saved.module, saved.name) in _DROPPED.get(module, ()) for module in modules)


def _layer(job: Workload) -> Iterator[Saved]:
    """Everything one layer keeps without recomputation, for one microbatch."""
    n = Sizes.of(job)
    yield from _norm(job, n)
    yield from _attention(job, n)
    yield from _norm(job, n)
    yield Saved("router", "input", n.t * n.h * job.dtype_bytes)
    yield from _experts(job, n)
    yield from _adapters(job, n)


def _norm(job: Workload, n: Sizes) -> Iterator[Saved]:
    if job.transformer_engine:
        yield Saved("norm", "input", n.t * n.h * job.dtype_bytes)
    elif job.dtype_bytes == 4:
        yield Saved("norm", "input", n.t * n.h * 4 * (2 if job.trains_all else 1))
    else:  # torch's works on an fp32 copy, and keeps the scaled one for its weight's gradient
        yield Saved("norm", "fp32 copies", n.t * n.h * 4 * (2 if job.trains_all else 1))
    yield Saved("norm", "statistics", n.t * 4)


def _attention(job: Workload, n: Sizes) -> Iterator[Saved]:
    b, fp8, trains = job.dtype_bytes, bool(job.fp8_recipe), job.trains_all
    # The norm's output: what linear_qkv multiplies (for its weight's gradient), or what its adapter does.
    if trains or (job.adapters and "linear_qkv" in job.adapters.targets):
        yield Saved("qkv", "input", n.t * n.h * (1 if fp8 and trains else b))
    ranks = job.topology.context_parallel_size
    if job.transformer_engine:
        # The rotated queries and keys, and the values where they lie: in linear_qkv's output, which they keep whole.
        yield Saved("attention", "queries and keys", n.T * (n.q + n.kv) * b)
        yield Saved("attention", "values", n.T * (n.q + 2 * n.kv) * b)
        yield Saved("attention", "output", n.T * n.q * b)
    else:
        # Queries, keys, values and output by head. Sines and cosines for both. Context-parallel ranks hold the keys of
        # all ranks up to their own tokens' places.
        keys = n.T * (2 * ranks + 1) / 2 if ranks > 1 else n.T
        yield Saved("attention", "queries", n.T * n.q * b)
        yield Saved("attention", "keys and values", 2 * keys * n.kv * b)
        yield Saved("attention", "output", n.T * n.q * b)
        if b == 2:
            yield Saved("attention", "rotation", 4 * n.T * job.shape.head_dim * b)
        if ranks > 1:
            yield Saved("attention", "masks", (n.T / 2) ** 2 * (2 * ranks + 1) * b)
    yield Saved("attention", "statistics", n.T * n.heads * 4)
    if not job.fused_attention:
        length = job.batch.seq_length / ranks
        yield Saved("attention", "scores", 2 * n.T * n.heads * length * b)
    adapted = job.adapters and "linear_proj" in job.adapters.targets
    if not job.transformer_engine and (trains or adapted):
        yield Saved("proj", "input", n.T * n.q * b)  # once more, by token
    if fp8 and trains:
        yield Saved("proj", "input", n.T * n.q)


def _experts(job: Workload, n: Sizes) -> Iterator[Saved]:
    b, trains, targets = job.dtype_bytes, job.trains_all, job.adapters.targets if job.adapters else ()
    product = 1 if job.fp8_recipe and trains else b  # an FP8 product keeps its input in FP8
    # Probabilities and the map of who goes where, of each token and expert, and again for the sorted rows.
    yield Saved("router", "scores", n.t * job.shape.num_moe_experts * 16)
    yield Saved("dispatch", "order", n.R * 12)
    if trains or "linear_fc1" in targets:
        yield Saved("experts", "fc1 input", n.R * n.h * product)
    yield Saved("experts", "gate and up", n.R * 2 * n.f * b)
    if not job.transformer_engine:
        # The activated gate, its product with up, and, where adapters make Megatron's own forward run, up itself.
        hooked = {"linear_fc1", "linear_fc2"} & set(targets)
        yield Saved("experts", "gate, product", n.R * n.f * b * (3 if hooked else 2))
    if trains or "linear_fc2" in targets:
        yield Saved("experts", "fc2 input", n.R * n.f * product)


def _adapters(job: Workload, n: Sizes) -> Iterator[Saved]:
    """The low-rank activations, and with DoRA each adapted output before its rows are stretched."""
    if job.adapters is None:
        return
    rows = {"linear_qkv": n.T, "linear_proj": n.t, "linear_fc1": n.R, "linear_fc2": n.R}
    widths = {"linear_qkv": n.q + 2 * n.kv, "linear_proj": n.h, "linear_fc1": 2 * n.f, "linear_fc2": n.h}
    for target in job.adapters.targets:
        each = rows[target] * job.adapters.share_of(target, job.shape) * job.dtype_bytes
        yield Saved("adapters", target, each * job.adapters.rank_of(target))
        if job.adapters.magnitudes:
            yield Saved("adapters", f"{target} unstretched", each * widths[target])


@functools.lru_cache(maxsize=8192)
def _sums(job: Workload) -> tuple[float, float, float]:
    """Bytes of one layer and microbatch: all of it, what is kept, and what comes back while some is made again."""
    chosen, found = job.recompute, list(_layer(job))
    whole = sum(saved.size for saved in found)
    if chosen.granularity == "full":
        again = whole * (chosen.num_layers if chosen.method == "uniform" else 1)
        return whole, Sizes.of(job).t * job.shape.hidden_size * job.dtype_bytes, again
    if chosen.granularity != "selective":
        return whole, whole, 0.0
    kept = sum(saved.size for saved in found if not _dropped(saved, chosen.modules))
    return whole, kept, whole - kept


def of_layers(job: Workload, layers: int) -> float:
    """Bytes that a chunk of some layers keeps for one microbatch."""
    whole, one, _ = _sums(job)
    chosen = job.recompute
    if chosen.granularity == "full":
        if chosen.method == "block":
            again = min(chosen.num_layers, layers)
            return again * one + (layers - again) * whole
        return -(-layers // chosen.num_layers) * one
    return layers * one


@functools.lru_cache(maxsize=8192)
def before_adapters(job: Workload) -> float:
    """Bytes that one layer keeps before its first adapter: in the very first layer there is no gradient to take there.

    The router's probabilities have none either, so the product they weigh is not kept.
    """
    n, targets = Sizes.of(job), job.adapters.targets if job.adapters else ()
    inputs = {
        "linear_qkv": ("qkv", "input"),
        "linear_proj": ("attention", "output") if job.transformer_engine else ("proj", "input"),
        "linear_fc1": ("experts", "fc1 input"),
        "linear_fc2": ("experts", "fc2 input"),
    }
    modules = job.recompute.modules if job.recompute.granularity == "selective" else ()
    total = 0.0
    for saved in _layer(job):
        if any((saved.module, saved.name) == inputs[target] for target in targets):
            break
        total += 0.0 if _dropped(saved, modules) else saved.size
    weighed = targets and targets[0] == "linear_fc1" and not job.transformer_engine
    return total + (n.R * n.f * job.dtype_bytes if weighed else 0.0)


def again(job: Workload) -> float:
    """Bytes that come back while something is recomputed."""
    return _sums(job)[2]
