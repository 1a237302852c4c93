"""Whether a job fits, and if not: what bursts, and the nearest settings that do fit."""

import dataclasses
import itertools
from dataclasses import dataclass

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.repair import distance, repair
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.memory import CATEGORIES
from mixtral_recipes.planner.plan import NEAR
from mixtral_recipes.planner.search import MOST_GPUS, Candidate, candidate, counts, layouts, search
from mixtral_recipes.planner.workload import Adapters, Workload


@dataclass(frozen=True)
class Repair:
    """Settings with which a job runs and fits.

    Attributes:
        words: What they are, for people.
        settings: Dotted overrides.
        found: The job with them.
    """

    words: str
    settings: tuple[str, ...]
    found: Candidate

    def __str__(self) -> str:
        taken = self.found.memory
        return f"{self.words}: {' '.join(self.settings)} ({taken.total:.0f} of {taken.capacity:.0f} GB)"


def refusal(job: Workload, card: Card) -> str | None:
    """Why a job cannot run on a card, with repairs that fit; None if it can.

    Args:
        job: The job; its layout must be valid.
        card: The card.
    """
    taken = memory.of_job(job, card)
    if taken.fits:
        return None
    largest = sorted(CATEGORIES, key=lambda name: -getattr(taken, name))[:3]
    shown = ", ".join(f"{name} {getattr(taken, name):.1f}" for name in largest)
    text = (
        f"{job.topology.describe()} on {job.topology.world_size} x {card.title}: needs {taken.total:.0f} GB on a GPU "
        f"with {taken.capacity:.0f} GB; the largest parts: {shown} GB."
    )
    found = [str(repair) for repair in repairs(job, card)]
    return text + (f" To fit: {'; or '.join(found)}." if found else "")


def check_formats(job: Workload, card: Card) -> None:
    """Refuse FP8 on a card that has none, or not of that kind.

    Raises:
        RecipeError: names the card and what it takes.
    """
    if not job.fp8_recipe:
        return
    if card.fp8_tflops is None:
        raise RecipeError(f"{card.title} does not support FP8; use --precision bf16.")
    if job.fp8_recipe == "mxfp8" and not card.mxfp8:
        raise RecipeError(
            f"trainer.plugins.fp8_recipe='mxfp8' needs a Blackwell GPU, not {card.title}; use delayed, tensorwise or "
            "blockwise."
        )


def check_layout_of(job: Workload, card: Card) -> None:
    """Refuse a layout that cannot run, with settings that run and fit.

    Raises:
        RecipeError: every broken rule, and a repair that the card's memory holds, where there is one.
    """
    broken = violations(job.topology, job.shape, job.batch)
    if not broken:
        return
    fix = repair(job.topology, job.shape, job.batch)
    if fix is None:
        raise RecipeError(" ".join(broken))
    repaired = dataclasses.replace(job, topology=fix.topology, shape=fix.model, batch=fix.batch)
    settings, taken, more = fix.settings, memory.of_job(repaired, card), False
    if not taken.fits:  # what is nearest by its sizes; the nearest that fits, on more GPUs if it takes them
        # Of more GPUs the batch as it was may be a multiple.
        batch = dataclasses.replace(fix.batch, global_batch_size=job.batch.global_batch_size)
        fitting = (
            nearest(dataclasses.replace(repaired, topology=job.topology), card)
            or _more_gpus(dataclasses.replace(repaired, topology=job.topology, batch=batch), card)
            or _more_gpus(dataclasses.replace(repaired, topology=job.topology), card)
        )
        if fitting is None:
            raise RecipeError(f"{' '.join(broken)} No layout on up to {MOST_GPUS:,} {card.title} has enough memory.")
        more, taken = fitting.job.topology.world_size > job.topology.world_size, fitting.memory
        settings = tuple(dict.fromkeys((*changes(job, fitting.job, card), *_unlike(fix.settings))))
    raise RecipeError(
        " ".join(broken)
        + (f" No layout on {job.topology.world_size} {card.title} has enough memory." if more else "")
        + f" To repair: {' '.join(settings)} ({taken.total:.0f} of {taken.capacity:.0f} GB on {card.title})"
    )


def _unlike(settings: tuple[str, ...]) -> list[str]:
    """Of a repair's settings, those that are no layout's."""
    return [
        setting for setting in settings if not setting.startswith(("trainer.strategy.", "data.global", "data.micro"))
    ]


def warning(job: Workload, card: Card) -> str | None:
    """What to say of a job that fits barely; None if there is room."""
    taken = memory.of_job(job, card)
    if not taken.fits or taken.total < NEAR * taken.capacity:
        return None
    return (
        f"memory: about {taken.total:.0f} of {taken.capacity:.0f} GB ({card.title}); it may not fit if some experts "
        "get more than their share of the tokens."
    )


def repairs(job: Workload, card: Card) -> list[Repair]:
    """Ways to make a job run: another layout on as many GPUs, more GPUs, fewer trained weights."""
    found: list[Repair] = []
    other = nearest(job, card) or _more_gpus(job, card)
    if other:
        found.append(Repair(f"on {other.job.topology.world_size} GPUs", changes(job, other.job, card), other))
    for words, option, adapters in _lighter(job):
        lighter = nearest(dataclasses.replace(job, adapters=adapters), card)
        if lighter:
            found.append(Repair(words, (option, *changes(job, lighter.job, card)), lighter))
            break
    return found


def _lighter(job: Workload) -> list[tuple[str, str, Adapters]]:
    """What takes less memory than a job's way to train, the nearest first: words, option, adapters."""
    if job.pretrains:
        return []
    found = [("LoRA", "--peft lora", Adapters())] if job.trains_all else []
    base = job.adapters or Adapters()
    if base.can_be_quantized and not job.fp8_recipe:
        found.append(("QLoRA", "--peft qlora", dataclasses.replace(base, quantized=True)))
    return found


def nearest(job: Workload, card: Card) -> Candidate | None:
    """The layout nearest to a job's own on as many GPUs, among those that fit and are not much slower than the best."""
    found = search(job, card, job.topology.world_size)
    best = next(found, None)
    if best is None:
        return None
    good = [best, *itertools.takewhile(lambda one: one.time.step <= 1.25 * best.time.step, found)]
    return min(
        good,
        key=lambda one: (
            distance(job.topology, one.job.topology)[0] + (one.job.recompute != job.recompute),
            one.time.step,
        ),
    )


def leanest(job: Workload, card: Card) -> Candidate | None:
    """The valid layout that takes least memory, whether it fits or not; None if no layout is valid."""
    valid = [t for t in layouts(job.topology.world_size, job) if not violations(t, job.shape, job.batch)]
    taken = [(memory.of_job(job.on(t), card).total, number) for number, t in enumerate(valid)]
    if not taken:
        return None
    return candidate(job.on(valid[min(taken)[1]]), card)


def _more_gpus(job: Workload, card: Card) -> Candidate | None:
    for world_size in counts(card.per_node, MOST_GPUS):
        if world_size > job.topology.world_size:
            found = next(search(job, card, world_size), None)
            if found:
                return found
    return None


def changes(before: Workload, after: Workload, card: Card) -> tuple[str, ...]:
    """What differs between two jobs, as dotted overrides."""
    found: list[str] = []
    old, new = before.topology, after.topology
    if old.world_size != new.world_size:
        nodes = max(new.world_size // card.per_node, 1)
        found += [f"trainer.num_nodes={nodes}", f"trainer.devices={new.world_size // nodes}"]
    for name, value in new.settings().items():
        follows = name == "expert_tensor_parallel_size" and old.expert_tensor_parallel_size is None
        if getattr(old, name) != value and not (follows and value == new.tensor_model_parallel_size):
            found.append(f"trainer.strategy.{name}={value}")
    if before.batch.micro_batch_size != after.batch.micro_batch_size:
        found.append(f"data.micro_batch_size={after.batch.micro_batch_size}")
    if before.batch.global_batch_size != after.batch.global_batch_size:
        found.append(f"data.global_batch_size={after.batch.global_batch_size}")
    if before.recompute != after.recompute:
        if not after.recompute.granularity:
            found.append("model.config.recompute_granularity=null")
        else:
            found += [
                f"model.config.recompute_granularity={after.recompute.granularity}",
                f"model.config.recompute_method={after.recompute.method}",
                f"model.config.recompute_num_layers={after.recompute.num_layers}",
            ]
    return tuple(found)
