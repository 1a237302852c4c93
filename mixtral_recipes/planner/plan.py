"""The answer to one question: a job in its layout, the best others, and what a change would give."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.operations import flops_per_token
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.planner import weights
from mixtral_recipes.planner.search import RECOMPUTED, Candidate, candidate, search
from mixtral_recipes.planner.workload import Adapters, Recompute, Workload

# Above this share of the memory a job may run out of it when experts get more than their share.
NEAR = 0.92


@dataclass(frozen=True)
class Plan:
    """What a job takes.

    Attributes:
        chosen: The job in its layout.
        card: The GPU.
        steps: Optimizer steps.
        kept_checkpoints: How many are on disk at the end.
        price: Of a GPU-hour; None where it is not known.
        alternatives: The best layouts by search, the fastest first.
        changes: What was changed -> the job with that change, in the same layout.
    """

    chosen: Candidate
    card: Card
    steps: int
    kept_checkpoints: int = 1
    price: float | None = None
    alternatives: tuple[Candidate, ...] = ()
    changes: tuple[tuple[str, Candidate], ...] = ()

    @property
    def hours(self) -> float:
        """All steps; no validation, no checkpoints."""
        return self.steps * self.chosen.time.step / 3600

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together."""
        return self.hours * self.chosen.job.topology.world_size

    def as_json(self) -> dict[str, Any]:
        """Everything, under the names that scripts read."""
        disk = checkpoint_gb(self.chosen.job)
        found = as_json(self.chosen) | {
            "hardware": self.card.name,
            "steps": self.steps,
            "hours": round(self.hours, 3),
            "gpu_hours": round(self.gpu_hours, 2),
            "disk_gb_per_checkpoint": round(disk, 3),
            "disk_gb": round(disk * self.kept_checkpoints, 3),
            "step_parts": self.chosen.time.as_json(),
            "alternatives": [as_json(other) for other in self.alternatives],
            "changes": [{"change": name} | as_json(other) for name, other in self.changes],
        }
        if self.price is not None:
            found["price"] = round(self.gpu_hours * self.price, 2)
        return found


def as_json(one: Candidate) -> dict[str, Any]:
    """A candidate under the names that scripts read."""
    t, batch = one.job.topology, one.job.batch
    return {
        "fits": one.memory.fits,
        "layout": layout_json(t)
        | {
            "micro_batch_size": batch.micro_batch_size,
            "global_batch_size": batch.global_batch_size,
            "recompute": one.job.recompute.granularity or None,
        },
        "memory_gb": one.memory.as_json(),
        "step_seconds": round(one.time.step, 4),
        "step_seconds_low": round(one.time.low, 4),
        "step_seconds_high": round(one.time.high, 4),
        "tokens_per_second_per_gpu": round(one.tokens_per_second, 1),
        "tflops_per_gpu": round(tflops(one), 1),
    }


def layout_json(t: Topology) -> dict[str, Any]:
    """A layout by Megatron's names, and in a line."""
    return {"gpus": t.world_size, **t.settings(), "expert_tensor_parallel_size": t.expert_tp, "text": t.describe()}


def tflops(one: Candidate) -> float:
    """Nominal operations per second and GPU, in 10^12."""
    job = one.job
    each = flops_per_token(job.shape, job.mean_length, topk=job.topk, adapters_only=not job.trains_all)
    return one.tokens_per_second * each / 1e12


def checkpoint_gb(job: Workload) -> float:
    """A checkpoint on disk: trained weights with their fp32 copies and moments; a frozen base is not in it."""
    total = weights.parameters(job.shape)
    if job.adapters:
        total = trained_parameters(job)
    return total * (job.dtype_bytes + (12 if job.dtype_bytes == 2 else 8)) / 1e9


def trained_parameters(job: Workload) -> int:
    """Trained parameters of the whole model."""
    if job.trains_all:
        return weights.parameters(job.shape)
    mine = weights.held(weights.Part.of(job.on(Topology(1)), 0))
    return mine.dense + mine.experts


def steps_for(samples: int, job: Workload, epochs: float) -> int:
    """Optimizer steps for so many passes over a data set; packs hold several samples."""
    sequences = samples
    if job.batch.packed and job.lengths:
        sequences = math.ceil(samples * job.lengths / job.batch.seq_length)
    return max(1, math.ceil(sequences * epochs / job.batch.global_batch_size))


def plan(
    job: Workload, card: Card, steps: int, *, best: int = 3, kept_checkpoints: int = 1, price: float | None = None
) -> Plan:
    """Plan a job.

    Args:
        job: The job in the layout asked for.
        card: The GPU.
        steps: Optimizer steps.
        best: How many other layouts to name.
        kept_checkpoints: How many stay on disk.
        price: Of a GPU-hour.
    """
    others = search(job, card, job.topology.world_size, micro_batches=(1, 2, 4)) if best else iter(())
    mine = candidate(job, card)
    different = itertools.islice((one for one in others if one.job != job), best)
    changes = [(name, candidate(other, card)) for name, other in variants(job, card)] if best else []
    return Plan(mine, card, steps, kept_checkpoints, price, tuple(different), tuple(changes))


def variants(job: Workload, card: Card) -> list[tuple[str, Workload]]:
    """The same layout with one change each."""
    found: list[tuple[str, Workload]] = []
    batch = job.batch
    if job.recompute.granularity:
        found.append(("recompute off", dataclasses.replace(job, recompute=Recompute())))
    else:
        found.append(("recompute every layer", dataclasses.replace(job, recompute=RECOMPUTED)))
        selective = Recompute("selective", modules=("moe_act", "layernorm"))
        found.append(("recompute activations and norms", dataclasses.replace(job, recompute=selective)))
    quantized = job.adapters is not None and job.adapters.quantized  # whose products are in 16 bits
    if card.fp8_tflops and not job.fp8_recipe and job.dtype_bytes == 2 and not quantized:
        recipe = "mxfp8" if card.mxfp8 else "delayed"
        gathered = True if card.mxfp8 else None  # as the recipes have it
        numbers = dataclasses.replace(batch, fp8=True)
        in_fp8 = dataclasses.replace(job, fp8_recipe=recipe, fp8_param_gather=gathered, batch=numbers)
        found.append(("FP8", in_fp8))
    if not batch.packed:
        double = dataclasses.replace(batch, micro_batch_size=2 * batch.micro_batch_size)
        if job.topology.num_microbatches(double) >= 1:
            found.append((f"micro batch {double.micro_batch_size}", dataclasses.replace(job, batch=double)))
    if job.adapters and job.adapters.can_be_quantized and not job.fp8_recipe:
        smaller = dataclasses.replace(job.adapters, quantized=True)
        found.append(("QLoRA (4-bit base)", dataclasses.replace(job, adapters=smaller)))
    if job.trains_all and not job.pretrains:
        found.append(("LoRA", dataclasses.replace(job, adapters=Adapters())))
    return found
