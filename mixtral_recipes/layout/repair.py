"""The nearest settings that make a broken layout run. Pure Python: loads no torch."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.rules import shape_violations, violations
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology, divisors, sizes, token_slices


@dataclass(frozen=True)
class Repair:
    """What to change so that every rule holds.

    Attributes:
        topology: The repaired layout, on as many processes.
        model: The model's shape, with more positions where the sequence needs them.
        batch: The repaired batch.
        settings: The changes as dotted overrides.
    """

    topology: Topology
    model: ModelShape
    batch: BatchShape
    settings: tuple[str, ...]


def check_recipe_layout(model: Any, trainer: Any, data: Any) -> None:
    """Refuse a recipe whose layout cannot run; its parts may be built or still be a `run.Config` each.

    Raises:
        RecipeError: all broken rules at once; or packs for what takes none.
    """
    batch = BatchShape.of(data, fp8=bool(trainer.plugins.fp8))
    if batch.packed and getattr(model.config, "fused_single_qkv_rope", False):  # Megatron asserts so in the first step
        raise RecipeError(
            "model.config.fused_single_qkv_rope=True takes no packed sequences; leave it out, or do not pack."
        )
    check_layout(Topology.of(trainer), ModelShape.of(model.config), batch)


def check_layout(layout: Topology, model: ModelShape, batch: BatchShape) -> None:
    """Refuse a layout that cannot run.

    Raises:
        RecipeError: names every broken rule, and the settings that repair them all on as many processes.
    """
    found = violations(layout, model, batch)
    if found:
        fix = repair(layout, model, batch)
        raise RecipeError(" ".join(found) + (f" To repair: {' '.join(fix.settings)}" if fix else ""))


@functools.lru_cache(maxsize=128)
def repair(layout: Topology, model: ModelShape, batch: BatchShape) -> Repair | None:
    """The fewest changes, by the smallest factors, after which no rule is broken.

    A layout that would run with another batch is left alone: the batch is rounded up to what it needs.

    Args:
        layout: The broken layout.
        model: The model.
        batch: The batch.

    Returns:
        The repair; None where no layout of that many processes works, which takes a world size or a model without any.
    """
    if layout.world_size < 1 or any(shape_violations(model)):
        return None
    if all(size >= 1 for _, size in sizes(layout)):
        fitted = _fitted(layout, batch)
        if not violations(layout, _with_positions(model, fitted), fitted):
            return _repaired(layout, model, batch, layout, fitted)
    found, fixed = nearest_layout(layout, _with_positions(model, batch), batch), batch
    if found is None:
        found, fixed = _nearest_with_batch(layout, model, batch)
    return _repaired(layout, model, batch, found, fixed) if found else None


def _with_positions(model: ModelShape, batch: BatchShape) -> ModelShape:
    """The model with as many positions as a sequence needs."""
    return dataclasses.replace(model, max_position_embeddings=max(model.max_position_embeddings, batch.seq_length))


def _repaired(layout: Topology, model: ModelShape, batch: BatchShape, found: Topology, fixed: BatchShape) -> Repair:
    whole = _with_positions(model, fixed)
    changes = (*_changes(layout, found), *_changes(model, whole), *_changes(batch, fixed))
    return Repair(found, whole, fixed, changes)


def nearest_layout(layout: Topology, model: ModelShape, batch: BatchShape) -> Topology | None:
    """The layout nearest to this one that allows exactly this batch; None if there is none."""
    valid = (other for other in _layouts(layout, model) if not violations(other, model, batch))
    return min(valid, key=functools.partial(distance, layout), default=None)


def _nearest_with_batch(layout: Topology, model: ModelShape, batch: BatchShape) -> tuple[Topology | None, BatchShape]:
    """The nearest layout when the batch may change too."""
    best: tuple[tuple[int, float], Topology, BatchShape] | None = None
    for other in _layouts(layout, model):
        fixed = _fitted(other, batch)
        changed, factor = distance(layout, other)
        growth = fixed.global_batch_size / max(batch.global_batch_size, 1)
        cost = (changed + len(list(_changes(batch, fixed))), factor + growth)
        if (best is None or cost < best[0]) and not violations(other, _with_positions(model, fixed), fixed):
            best = (cost, other, fixed)
    return (best[1], best[2]) if best else (None, batch)


def _fitted(layout: Topology, batch: BatchShape) -> BatchShape:
    """The batch rounded up to what a layout needs."""
    micro = 1 if batch.packed else max(batch.micro_batch_size, 1)
    unit = token_slices(layout) * (16 if batch.fp8 else 1)
    microbatches = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size else 1
    step = micro * layout.data_parallel_size * microbatches
    return dataclasses.replace(
        batch,
        micro_batch_size=micro,
        seq_length=_round_up(batch.seq_length, unit),
        global_batch_size=_round_up(batch.global_batch_size, step),
    )


def _round_up(number: int, unit: int) -> int:
    unit = max(unit, 1)  # a layout of more ranks than there are has none
    return max(-(-number // unit), 1) * unit


def distance(layout: Topology, other: Topology) -> tuple[int, float]:
    """How many sizes differ, and by what factors."""
    pairs = [(max(a, 1), b) for (_, a), (_, b) in zip(sizes(layout), sizes(other), strict=True)]
    changed = sum(a != b for a, b in pairs) + (layout.sequence_parallel != other.sequence_parallel)
    return changed, sum(a / b + b / a for a, b in pairs)


def _layouts(near: Topology, model: ModelShape) -> Iterator[Topology]:
    """Every layout of as many processes that could be worth a look."""
    tensor = [size for size in divisors(near.world_size) if model.num_query_groups % size == 0]
    pipeline = [size for size in divisors(near.world_size) if model.num_layers % size == 0]
    for tp, pp, cp in itertools.product(tensor, pipeline, divisors(near.world_size)):
        if near.world_size % (tp * pp * cp):
            continue
        chunks = {near.virtual_pipeline_model_parallel_size, None} if pp > 1 else {None}
        expert_tp = {near.expert_tensor_parallel_size, None, 1}
        for ep, vpp, etp in itertools.product(divisors(model.num_moe_experts), chunks, expert_tp):
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


# Where a recipe keeps each setting.
_PATHS = {Topology: "trainer.strategy", ModelShape: "model.config", BatchShape: "data"}


def _changes[T: (Topology, ModelShape, BatchShape)](before: T, after: T) -> Iterator[str]:
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old != new:
            yield f"{_PATHS[type(before)]}.{field.name}={new}"
