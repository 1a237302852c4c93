"""Every parallel size of a run, its arithmetic and its preflight checks. Pure Python: loads no torch.

Nothing else in this package computes ``world_size // (tp * pp * cp)``; ask a `Topology`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    vocab_size: int = 32000
    make_vocab_size_divisible_by: int = 128
    kv_channels: int | None = None

    @staticmethod
    def of(config: Any) -> "ModelShape":
        """The sizes of a Mixtral configuration, whether already built or still a `run.Config` of one."""
        return ModelShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups or config.num_attention_heads,
            ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size or 4 * config.hidden_size,
            num_moe_experts=config.num_moe_experts or 1,
            max_position_embeddings=config.max_position_embeddings,
            kv_channels=config.kv_channels,
        )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


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

    def megatron_sizes(self) -> dict[str, Any]:
        """Every parallel size under its name in Megatron's config and in `initialize_model_parallel`."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tp,
        }

    def num_microbatches(self, batch: BatchShape) -> int:
        """Forward passes per optimizer step on each data-parallel rank."""
        return batch.global_batch_size // (batch.micro_batch_size * self.data_parallel_size)

    def padded_vocab_size(self, model: ModelShape) -> int:
        """The vocabulary rounded up so that every tensor-parallel rank holds an equal share."""
        unit = model.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-model.vocab_size // unit) * unit

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
        wrong = list(_size_rules(self, model, batch))
        layout, model, batch = _at_least_one(self), _at_least_one(model), _at_least_one(batch)
        return [*wrong, *_world_rules(layout), *_model_rules(layout, model), *_batch_rules(layout, model, batch)]

    def check(self, model: ModelShape, batch: BatchShape) -> None:
        """Refuse a layout that cannot run.

        Raises:
            RecipeError: names every broken rule, and the settings that repair them all on as many processes.
        """
        found = self.violations(model, batch)
        if not found:
            return
        from mixtral_recipes.layout.repair import repair

        fix = repair(self, model, batch)
        raise RecipeError(" ".join(found) + (f" To repair: {' '.join(fix.settings)}" if fix else ""))

    def nearest_valid(self, model: ModelShape, batch: BatchShape) -> "Topology | None":
        """The layout on as many processes that changes the fewest sizes, by the smallest factors; None if none."""
        from mixtral_recipes.layout.repair import nearest_layout

        return nearest_layout(self, model, batch)


def sizes(layout: Topology) -> list[tuple[str, int]]:
    """Every parallel size by its name, defaults filled in."""
    return [
        ("tensor_model_parallel_size", layout.tensor_model_parallel_size),
        ("pipeline_model_parallel_size", layout.pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", _value(layout.virtual_pipeline_model_parallel_size)),
        ("context_parallel_size", layout.context_parallel_size),
        ("expert_model_parallel_size", layout.expert_model_parallel_size),
        ("expert_tensor_parallel_size", _value(layout.expert_tensor_parallel_size, layout.tensor_model_parallel_size)),
    ]


def _value(size: int | None, default: int = 1) -> int:
    return default if size is None else size


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def token_slices(layout: Topology) -> int:
    """Slices each sequence is cut into: 2 x CP under context parallelism, times TP under sequence parallelism."""
    by_context = 2 * layout.context_parallel_size if layout.context_parallel_size > 1 else 1
    return by_context * (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)


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


def _size_rules(t: Topology, m: ModelShape, b: BatchShape) -> Iterator[str]:
    counted = [("world size", t.world_size), *sizes(t)]
    counted += [(name, getattr(b, name)) for name in ("global_batch_size", "micro_batch_size", "seq_length")]
    counted += [(name, getattr(m, name)) for name in ("vocab_size", "make_vocab_size_divisible_by")]
    for name, size in counted:
        if size < 1:
            yield f"{name}={size} must be at least 1."


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
            f"tensor_model_parallel_size={tp} without sequence_parallel: Megatron's MoE layer needs it; "
            "set sequence_parallel=True."
        )
    if t.sequence_parallel and tp == 1:
        yield "sequence_parallel=True needs tensor_model_parallel_size > 1; set it to False."


def _batch_rules(t: Topology, m: ModelShape, b: BatchShape) -> Iterator[str]:
    slices = token_slices(t)
    if b.seq_length % slices:
        yield f"seq_length={b.seq_length} is not a multiple of {slices} (2 x CP for CP > 1, x TP under SP)."
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
        yield f"FP8 needs a multiple of 16 tokens per rank: seq_length={b.seq_length} over {slices} slices is not."
    if m.ffn_hidden_size % (16 * t.expert_tp):
        yield (
            f"FP8 needs a multiple of 16 rows per rank: ffn_hidden_size={m.ffn_hidden_size} over "
            f"expert_tensor_parallel_size={t.expert_tp} is not."
        )
    rows = m.head_dim * (m.num_attention_heads + 2 * m.num_query_groups)
    if rows % (16 * t.tensor_model_parallel_size) or m.hidden_size % 16:
        yield (
            f"FP8 needs a multiple of 16 rows per rank: attention's {rows} over "
            f"tensor_model_parallel_size={t.tensor_model_parallel_size} are not."
        )
