"""Every parallel size of a run, its arithmetic and its preflight checks. Pure Python: loads no torch.

Nothing else in this package computes ``world_size // (tp * pp * cp)``; ask a `Topology`.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mixtral_recipes.errors import RecipeError


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides which layouts it allows (names are Megatron's)."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    num_moe_experts: int
    max_position_embeddings: int


@dataclass(frozen=True)
class BatchShape:
    """Sequences per step and their length.

    Attributes:
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences one data-parallel rank passes through the model at once.
        seq_length: Tokens per sequence.
        packed: Whether several samples share one sequence.
        fp8: Whether matrix products run in FP8.
    """

    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    packed: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Topology:
    """How a run's processes are laid out over Megatron's parallel axes.

    Attributes:
        world_size: Processes, one per GPU.
        tensor_model_parallel_size: Ranks that share each matrix outside the experts.
        pipeline_model_parallel_size: Consecutive groups of layers.
        virtual_pipeline_model_parallel_size: Interleaved model chunks per pipeline rank; None for one.
        context_parallel_size: Ranks that share each sequence.
        expert_model_parallel_size: Ranks the experts are spread over.
        expert_tensor_parallel_size: Ranks that share each expert's matrices; None means the tensor-parallel size.
        sequence_parallel: Whether tensor-parallel ranks split the sequence outside matrix products.
    """

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False

    @property
    def expert_tp(self) -> int:
        """The expert tensor-parallel size with its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense weights: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of all experts: ETP x EP x PP."""
        return self.expert_tp * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that read different data."""
        return self.world_size // self.model_ranks

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert."""
        return self.world_size // self.expert_ranks

    def num_microbatches(self, batch: BatchShape) -> int:
        """Forward passes per optimizer step on each data-parallel rank."""
        return batch.global_batch_size // (batch.micro_batch_size * self.data_parallel_size)

    def describe(self) -> str:
        """One line, in the order people write it: ``TP1 PP4 VPP8 CP1 EP8 DP16``."""
        parts = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "VPP": self.virtual_pipeline_model_parallel_size,
            "CP": self.context_parallel_size,
            "EP": self.expert_model_parallel_size,
            "ETP": self.expert_tensor_parallel_size,
            "DP": self.data_parallel_size,
        }
        return " ".join(f"{k}{v}" for k, v in parts.items() if v) + (" SP" if self.sequence_parallel else "")

    def violations(self, model: ModelShape, batch: BatchShape) -> list[str]:
        """Every rule this layout breaks, each as ``setting=value: the rule; the nearest values that work``."""
        found: list[str] = []
        for size in _sizes(self):
            if size[1] < 1:
                found.append(f"{size[0]}={size[1]} must be at least 1.")
        if found:
            return found
        return [*_world_rules(self), *_model_rules(self, model), *_batch_rules(self, model, batch)]

    def check(self, model: ModelShape, batch: BatchShape) -> None:
        """Refuse a layout that cannot run.

        Raises:
            RecipeError: names every broken rule, and the nearest layout of this world size that breaks none.
        """
        found = self.violations(model, batch)
        if not found:
            return
        fix = self.nearest_valid(model, batch)
        advice = f" Nearest layout that works on {self.world_size} processes: {fix.describe()}." if fix else ""
        raise RecipeError(" ".join(found) + advice)

    def nearest_valid(self, model: ModelShape, batch: BatchShape) -> "Topology | None":
        """The layout on as many processes that changes the fewest sizes, by the smallest factors; None if none."""

        def distance(other: Topology) -> tuple[int, float]:
            pairs = list(zip(_sizes(self), _sizes(other), strict=True))
            changed = sum(a != b for a, b in pairs) + (self.sequence_parallel != other.sequence_parallel)
            return changed, sum(max(a[1], 1) / b[1] + b[1] / max(a[1], 1) for a, b in pairs)

        valid = (layout for layout in _layouts(self, model) if not layout.violations(model, batch))
        return min(valid, key=distance, default=None)


def _sizes(layout: Topology) -> list[tuple[str, int]]:
    return [
        ("tensor_model_parallel_size", layout.tensor_model_parallel_size),
        ("pipeline_model_parallel_size", layout.pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", layout.virtual_pipeline_model_parallel_size or 1),
        ("context_parallel_size", layout.context_parallel_size),
        ("expert_model_parallel_size", layout.expert_model_parallel_size),
        ("expert_tensor_parallel_size", layout.expert_tp),
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _choices(numbers: list[int]) -> str:
    """``use 1, 2, 4 or 8``."""
    words = [str(n) for n in numbers]
    return "use " + (words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1])


def _layouts(near: Topology, model: ModelShape) -> Iterator[Topology]:
    world = _divisors(near.world_size)
    experts = _divisors(model.num_moe_experts)
    for tp, pp, cp, ep in itertools.product(world, world, world, experts):
        if tp * pp * cp > near.world_size:
            continue
        chunks = {near.virtual_pipeline_model_parallel_size, None} if pp > 1 else {None}
        for vpp, etp in itertools.product(chunks, {near.expert_tensor_parallel_size, None, 1}):
            yield dataclasses.replace(
                near,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                sequence_parallel=tp > 1,
            )


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
            f"{_choices(_divisors(m.num_moe_experts))}."
        )
    if m.num_attention_heads % tp:
        yield f"tensor_model_parallel_size={tp} does not divide num_attention_heads={m.num_attention_heads}."
    if m.num_query_groups % tp:
        yield (
            f"tensor_model_parallel_size={tp} does not divide num_query_groups={m.num_query_groups}; "
            f"{_choices(_divisors(m.num_query_groups))}."
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
            f"tensor_model_parallel_size={tp} without sequence_parallel: Megatron's MoE layer needs it; "
            "set sequence_parallel=True."
        )
    if t.sequence_parallel and tp == 1:
        yield "sequence_parallel=True needs tensor_model_parallel_size > 1; set it to False."


def _batch_rules(t: Topology, m: ModelShape, b: BatchShape) -> Iterator[str]:
    slice_of = 2 * t.context_parallel_size if t.context_parallel_size > 1 else 1
    slices = slice_of * (t.tensor_model_parallel_size if t.sequence_parallel else 1)
    if b.seq_length % slices:
        yield f"seq_length={b.seq_length} is not a multiple of {slices} (2 x CP for CP > 1, x TP under SP)."
    if b.fp8 and (b.seq_length * b.micro_batch_size // slices) % 16:
        yield f"FP8 needs a multiple of 16 tokens per rank: seq_length={b.seq_length} over {slices} slices is not."
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
