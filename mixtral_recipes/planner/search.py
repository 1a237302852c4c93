"""Every valid layout of a job, the fastest first among those that fit."""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.layout.topology import Topology, divisors
from mixtral_recipes.planner import memory, speed
from mixtral_recipes.planner.memory import Memory
from mixtral_recipes.planner.speed import Time
from mixtral_recipes.planner.weights import expert_parameters, parameters
from mixtral_recipes.planner.workload import Recompute, Workload

# Of the card's memory, what a layout may be planned to take: the rest is for experts that get more than their share.
SAFE = 0.95
RECOMPUTED = Recompute("full")
MOST_GPUS = 1024  # that a search goes up to


@dataclass(frozen=True)
class Candidate:
    """A job in one layout, with what it takes.

    Attributes:
        job: The job in that layout.
        memory: Of the fullest rank.
        time: Of a step.
    """

    job: Workload
    memory: Memory
    time: Time

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU, padding included."""
        return self.job.tokens_per_step / self.time.step / self.job.topology.world_size


def candidate(job: Workload, card: Card) -> Candidate:
    """A job with its memory and time."""
    return Candidate(job, memory.of_job(job, card), speed.of_job(job, card))


def layouts(world_size: int, job: Workload, *, per_node: int = 8) -> Iterator[Topology]:
    """Every layout for this number of processes that Megatron can run, with tensor parallelism inside a node.

    Interleaved chunks are of one layer, or of as few as divide; expert-tensor parallelism is 1 or follows the tensor
    axis.
    """
    s = job.shape
    tensor = [d for d in divisors(world_size) if d <= per_node and s.num_query_groups % d == 0]
    pipeline = [d for d in divisors(world_size) if s.num_layers % d == 0]
    for tp, pp in itertools.product(tensor, pipeline):
        if world_size % (tp * pp):
            continue
        depth = s.num_layers // pp
        chunks: list[int | None] = [None]
        if pp > 1:
            chunks += [d for d in divisors(depth) if d > 1 and (d == depth or d * 2 >= depth or d in (2, 4))]
        for cp in divisors(world_size // (tp * pp)):
            if cp > 1 and job.batch.seq_length % (2 * cp * tp):
                continue
            for ep, etp in itertools.product(divisors(s.num_moe_experts), sorted({1, tp})):
                if world_size % (ep * etp * pp):
                    continue
                for vpp in chunks:
                    yield Topology(world_size, tp, pp, vpp, cp, ep, etp, sequence_parallel=tp > 1)


def search(job: Workload, card: Card, world_size: int, *, micro_batches: Sequence[int] = ()) -> Iterator[Candidate]:
    """Every layout that runs and fits, the fastest first; of those as fast as each other, the one with fewer axes.

    Memory takes longer to count than time, so it is counted when a layout's turn comes. What does not fit is tried
    again with every layer recomputed, which makes a step longer.

    Args:
        job: The job; its layout is replaced.
        card: The GPU.
        world_size: How many of them.
        micro_batches: Micro batches to try beside the job's own.
    """
    sizes = sorted({job.batch.micro_batch_size, *(() if job.batch.packed else micro_batches)})
    waiting: list[tuple[tuple[float, int], int, Workload, Time]] = []
    number = itertools.count()

    def wait(trial: Workload) -> None:
        time = speed.of_job(trial, card)
        heapq.heappush(waiting, ((round(time.step, 4), trial.topology.model_ranks), next(number), trial, time))

    for trial in _running(job, card, world_size, sizes):
        wait(dataclasses.replace(trial, recompute=Recompute()))
    while waiting:
        key, equal = waiting[0][0], []
        while waiting and waiting[0][0] == key:
            _, _, trial, time = heapq.heappop(waiting)
            taken = memory.of_job(trial, card)
            if taken.total <= SAFE * card.memory_gb:
                equal.append(Candidate(trial, taken, time))
            elif trial.recompute != RECOMPUTED:
                wait(dataclasses.replace(trial, recompute=RECOMPUTED))
        yield from sorted(equal, key=lambda one: one.memory.total)


def _running(job: Workload, card: Card, world_size: int, micro_batches: Sequence[int]) -> Iterator[Workload]:
    """A job in every layout that Megatron runs and that could fit."""
    batches = [dataclasses.replace(job.batch, micro_batch_size=size) for size in micro_batches]
    for topology in layouts(world_size, job, per_node=card.per_node):
        if _floor(job, topology) > SAFE * card.memory_gb:
            continue
        for batch in batches:
            if not violations(topology, job.shape, batch):
                yield job.on(topology, batch=batch)


def fewest(job: Workload, card: Card, *, most: int = MOST_GPUS) -> int | None:
    """The fewest GPUs that hold a job in some layout; None if ``most`` are not enough."""
    for world_size in counts(card.per_node, most):
        for trial, choice in itertools.product(
            _running(job, card, world_size, (job.batch.micro_batch_size,)), (RECOMPUTED, Recompute())
        ):
            if memory.of_job(dataclasses.replace(trial, recompute=choice), card).total <= SAFE * card.memory_gb:
                return world_size
    return None


def smallest(job: Workload, card: Card, *, most: int = MOST_GPUS) -> Candidate | None:
    """The fastest layout on the fewest GPUs it fits on; None if ``most`` are not enough."""
    world_size = fewest(job, card, most=most)
    return None if world_size is None else next(search(job, card, world_size))


def counts(per_node: int, most: int) -> list[int]:
    """Numbers of GPUs that people have: of one node in powers of two, then nodes in powers of two."""
    found, size = [], 1
    while size <= most:
        found.append(size)
        size *= 2
    return [size for size in found if size <= per_node or size % per_node == 0]


def _floor(job: Workload, t: Topology) -> float:
    """GB that a layout takes at least: weights, gradients and optimizer state without padding, on an average stage."""
    if job.adapters and job.adapters.quantized:
        weight = job.adapters.bits / 8
    elif job.fp8_recipe:
        weight = 2.0
    else:
        weight = job.dtype_bytes
    experts = expert_parameters(job.shape) / t.expert_ranks
    dense = (parameters(job.shape) - expert_parameters(job.shape)) / (
        t.tensor_model_parallel_size * t.pipeline_model_parallel_size
    )
    total = (experts + dense) * weight
    if job.trains_all and not job.sharded_weights:
        copies = t.data_parallel_size * t.context_parallel_size if job.distributed_optimizer else 1
        of_experts = t.expert_data_parallel_size if job.distributed_optimizer else 1
        total += (experts + dense) * job.grad_bytes + 8 * (experts / of_experts + dense / max(copies, 1))
    elif job.sharded_weights:
        return 0.0
    return total / 1e9
