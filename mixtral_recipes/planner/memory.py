"""Memory of one rank by category, for each pipeline stage. All figures in GB of 10^9 bytes.

Weights, gradients and optimizer are exact (`weights.py`); activations are what the modules keep (`activations.py`)
times what the pipeline schedule holds at once; the rest is stated below, constant by constant.
"""

import dataclasses
from dataclasses import dataclass

from mixtral_recipes.layout.cards import Card
from mixtral_recipes.planner import activations
from mixtral_recipes.planner.activations import Sizes
from mixtral_recipes.planner.weights import Held, Part, buffers, held, quantized_bytes
from mixtral_recipes.planner.workload import Workload

# Logits and loss: bf16 logits and their gradient, and the fp32 copy that becomes softmax and gradient in place
# (Megatron's `vocab_parallel_cross_entropy`). Fitted on no row; the rows of Megatron's golden values give 8.0 to 8.4.
# Transformer Engine's kernel, from 2.20 on, needs 4; which version a run will find is not known here.
_LOGITS_BYTES = 8
# Work space of cuBLAS: 32 MiB for the stream that computes and for each of four that Transformer Engine multiplies
# experts on (`get_multi_stream_cublas_workspace`).
_WORKSPACE = 5 * 32 * 2**20
# Outside torch's allocator. Context: a CUDA context with the libraries' kernels loaded. NCCL: buffers of each
# communicator with more than one rank (16 channels of 4 MB, and protocol buffers). Both as seen on H100 and A100.
_CONTEXT_GB = 0.7
_PROCESS_GB = 0.8  # on a CPU: Python with torch and Megatron loaded
_COMMUNICATOR_GB = 0.2
# Of what comes and goes, what torch's allocator cannot hand out again. Fitted on the three A100 rows that give both
# nvidia-smi and torch's peak.
_FRAGMENTED = 0.20


@dataclass(frozen=True)
class Memory:
    """GB on one rank.

    Attributes:
        weights: Weights, all dtypes.
        gradients: Gradient buffers.
        optimizer: fp32 weights and Adam's moments.
        adapters: Adapters with their gradients and optimizer state.
        activations: Kept for the backward pass, recomputation included.
        logits: Output layer and loss.
        buffers: Work space: dispatch, gathered sequences, weight gradients on their way, libraries.
        overhead: Outside torch's allocations: CUDA context, NCCL, fragmentation.
        capacity: What the card has.
        stage: The pipeline stage.
    """

    weights: float
    gradients: float
    optimizer: float
    adapters: float
    activations: float
    logits: float
    buffers: float
    overhead: float
    capacity: float
    stage: int = 0

    @property
    def allocated(self) -> float:
        """The peak of torch's allocator."""
        return self.total - self.overhead

    @property
    def total(self) -> float:
        """Everything: what nvidia-smi shows."""
        return sum(getattr(self, name) for name in CATEGORIES)

    @property
    def resident(self) -> float:
        """What stays allocated between steps."""
        return self.weights + self.gradients + self.optimizer + self.adapters

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.total <= self.capacity

    def as_json(self) -> dict[str, float]:
        """Each category, ``total`` and ``capacity``."""
        fields = {name: getattr(self, name) for name in CATEGORIES} | {"total": self.total, "capacity": self.capacity}
        return {name: round(value, 3) for name, value in fields.items()}


CATEGORIES = ("weights", "gradients", "optimizer", "adapters", "activations", "logits", "buffers", "overhead")


def of_job(job: Workload, card: Card) -> Memory:
    """Memory of the fullest rank."""
    return max(by_stage(job, card), key=lambda memory: memory.total)


def by_stage(job: Workload, card: Card) -> list[Memory]:
    """Memory of a rank of each pipeline stage that can be the fullest: the first, the second and the last.

    Those between hold fewer microbatches than the second and no vocabulary.
    """
    stages = job.topology.pipeline_model_parallel_size
    return [of_stage(job, card, stage) for stage in sorted({0, min(1, stages - 1), stages - 1})]


def of_stage(job: Workload, card: Card, stage: int) -> Memory:
    """Memory of a rank of one pipeline stage."""
    base, trained = held(Part.of(job, stage)), buffers(job, stage)
    elements = sum(b.numel for b in trained)
    gradients = elements * job.grad_bytes
    states = sum(b.shard for b in trained) * (job.state_bytes if job.dtype_bytes == 2 else 8)
    weights = weight_bytes(job, stage)
    if job.trains_all:
        adapters = 0.0
    else:
        own = elements * job.dtype_bytes
        adapters, gradients, states = own + gradients + states, 0.0, 0.0
    if job.sharded_weights:
        weights, gradients = _sharded(job, base, weights, gradients)
    kept = kept_activations(job, stage)
    again, logits = activations.again(job), _logits(job, stage)
    # While the loss is computed nothing is recomputed and no layer's backward pass is under way: of those, what goes
    # beyond the logits counts.
    beyond = max(again + _passing(job, base) - logits, 0.0)
    memory = Memory(
        weights=weights / 1e9,
        gradients=gradients / 1e9,
        optimizer=states / 1e9,
        adapters=adapters / 1e9,
        activations=(kept + min(again, beyond)) / 1e9,
        logits=logits / 1e9,
        buffers=(_constant_work(job, base) + beyond - min(again, beyond)) / 1e9,
        overhead=0.0,
        capacity=card.memory_gb,
        stage=stage,
    )
    moving = memory.activations + memory.logits + memory.buffers
    overhead = _CONTEXT_GB + _COMMUNICATOR_GB * _communicators(job) + _FRAGMENTED * moving
    return dataclasses.replace(memory, overhead=overhead if card.name != "cpu" else _PROCESS_GB)


def weight_bytes(job: Workload, stage: int) -> float:
    """Bytes of a stage's weights without adapters; trained ones with the padding of their buffers."""
    base = held(Part.of(job, stage))
    if job.adapters and job.adapters.quantized:
        return base.plain * job.dtype_bytes + base.matrices * quantized_bytes(job.adapters)
    if job.fp8_recipe:
        # By row and by column, one byte each; beside bf16 weights, or instead of them. MXFP8 has a scale for 32.
        copies = 2 * (33 / 32 if job.fp8_recipe == "mxfp8" else 1)
        each = copies if job.fp8_weights else job.dtype_bytes + copies
        return base.plain * job.dtype_bytes + base.matrices * each
    if job.trains_all and job.distributed_optimizer:
        return sum(b.numel for b in buffers(job, stage)) * job.dtype_bytes
    return (base.plain + base.matrices) * job.dtype_bytes


def _sharded(job: Workload, base: Held, weights: float, gradients: float) -> tuple[float, float]:
    """Weights and gradients when the copies share them too: a share of each, and two layers' weights whole."""
    t = job.topology
    copies, of_experts = t.data_parallel_size * t.context_parallel_size, t.expert_data_parallel_size
    dense, experts = base.plain, base.matrices  # nearly all of the matrices are experts'
    share = (dense / copies + experts / of_experts) / (dense + experts)
    layers = job.shape.num_layers / t.pipeline_model_parallel_size
    return weights * (share + 2 / layers), gradients * (share + 1 / layers)


def in_flight(job: Workload, stage: int) -> int:
    """Forward passes of a chunk that a stage holds at once, under Megatron's 1F1B schedules.

    Source: Megatron-Core `pipeline_parallel/schedules.py`, get_pp_rank_microbatches.
    """
    t = job.topology
    pp, vpp = t.pipeline_model_parallel_size, t.virtual_pipeline_model_parallel_size
    microbatches = max(t.num_microbatches(job.batch), 1)
    if pp == 1:
        return 1
    if vpp is None:
        return min(pp - stage - 1, microbatches) + (1 if pp - stage - 1 < microbatches else 0)
    warm = (pp - stage - 1) * 2 + (vpp - 1) * pp
    return min(warm + 1, microbatches * vpp)


def kept_activations(job: Workload, stage: int) -> float:
    """Bytes that a stage's layers keep for the backward passes to come."""
    t = job.topology
    layers = job.shape.num_layers // (t.pipeline_model_parallel_size * (t.virtual_pipeline_model_parallel_size or 1))
    n, flying = Sizes.of(job), in_flight(job, stage)
    kept = flying * activations.of_layers(job, layers) - _without_gradient(job, stage, flying)
    one = n.t * n.h * job.dtype_bytes
    last = stage == t.pipeline_model_parallel_size - 1
    if t.pipeline_model_parallel_size > 1:
        # The schedule keeps what a chunk received (Transformer Engine's layers keep the same tensor) and what it sent.
        if not job.frees_outputs:
            kept += (flying - last) * one
        if not job.transformer_engine and job.recompute.granularity != "full":
            kept += (flying - (0 if stage else min(flying, t.pipeline_model_parallel_size))) * one
    # The angles of the rotary embedding, fp32, once for each chunk.
    kept += (t.virtual_pipeline_model_parallel_size or 1) * n.T * job.shape.head_dim * 4
    if last:  # the last norm (in plain torch with fp32 copies) and the output layer's input
        norm = 1 if job.transformer_engine or job.dtype_bytes == 4 else 4 if job.trains_all else 2
        kept += one * (norm + job.trains_all)
    return kept


def _without_gradient(job: Workload, stage: int, flying: int) -> float:
    """Bytes that the model's first layer does not keep since nothing before its first adapter is trained."""
    adapters, t = job.adapters, job.topology
    if stage or adapters is None or job.recompute.granularity == "full" or "word_embeddings" in adapters.whole:
        return 0.0
    pp, vpp = t.pipeline_model_parallel_size, t.virtual_pipeline_model_parallel_size or 1
    passes = sum(number // pp % vpp == 0 for number in range(flying))
    return passes * activations.before_adapters(job)


def _logits(job: Workload, stage: int) -> float:
    t = job.topology
    if stage != t.pipeline_model_parallel_size - 1:
        return 0.0
    rows = job.shape.padded_vocab_size(t.tensor_model_parallel_size) / t.tensor_model_parallel_size
    return Sizes.of(job).T * rows * (_LOGITS_BYTES if job.dtype_bytes == 2 else 12)


def _passing(job: Workload, base: Held) -> float:
    """What one layer's backward pass holds beside what was kept: the experts' gradients, the largest at once."""
    n, b = Sizes.of(job), job.dtype_bytes
    of_experts = n.R * (3 * n.f + n.h) * b
    if job.adapters and job.adapters.magnitudes:
        return max(of_experts, base.largest * 8)  # forward, the rows' lengths are taken of an fp32 copy and its squares
    if job.adapters and job.adapters.quantized:
        return of_experts + base.largest * b  # one matrix in 16 bits
    return of_experts + (0 if job.wgrad_fusion or not job.trains_all else base.largest * b)


def _constant_work(job: Workload, base: Held) -> float:
    """What stays allocated beside weights and states: libraries' work space, stand-ins for fused weight gradients."""
    if not job.transformer_engine:
        return 0.0
    stand_ins = base.kinds if job.trains_all and job.wgrad_fusion else 0
    return _WORKSPACE + stand_ins * job.dtype_bytes


def _communicators(job: Workload) -> int:
    t = job.topology
    axes = (
        t.tensor_model_parallel_size,
        t.pipeline_model_parallel_size,
        t.context_parallel_size,
        t.expert_model_parallel_size,
        t.data_parallel_size,
        t.expert_data_parallel_size,
    )
    return sum(size > 1 for size in axes)
