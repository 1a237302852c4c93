"""What to train, at which rate and batch, for the data at hand: what papers found, and rules of thumb named as such."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.layout.cards import Card
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.plan import trained_parameters
from mixtral_recipes.planner.search import SAFE, Candidate
from mixtral_recipes.planner.workload import LINEARS, Workload

_QLORA = "Dettmers et al., QLoRA, arXiv 2305.14314, section 4 and appendix A"
_LESS = "Biderman et al., LoRA Learns Less and Forgets Less, arXiv 2405.09673, section 4"
_REGRET = "Schulman et al., LoRA Without Regret, Thinking Machines Lab, 2025"
_CAPACITY = "Allen-Zhu and Li, Physics of Language Models 3.3, arXiv 2404.05405"
_RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        setting: Override that follows it; empty where there is none.
        why: The reason.
        source: A paper, or ``rule of thumb``.
    """

    setting: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"{self.setting or 'advice'}: {self.why} [{self.source}]"


_ADAPTERS_FIRST = Advice(
    "--peft lora",
    "up to a few hundred million tokens, adapters match training all weights and forget less of what the model knew.",
    f"{_LESS}; {_REGRET}",
)


def advise(chosen: Candidate, card: Card, data: Mapping[str, Any] | None) -> list[Advice]:
    """Recommendations for a job.

    Args:
        chosen: The job, with what it takes.
        card: The GPU.
        data: ``samples``, ``tokens`` and ``mean_tokens`` of the training split; None where no data was named.
    """
    job = chosen.job
    found = list(_adapters(job, card, data)) if job.adapters else [_ADAPTERS_FIRST]
    if job.shape.hidden_size > 1000:  # a tiny model has its own
        found.append(_learning_rate(job))
    if data:
        found += _batch(job, data)
    return found


def _adapters(job: Workload, card: Card, data: Mapping[str, Any] | None) -> Iterator[Advice]:
    assert job.adapters is not None
    everywhere = dataclasses.replace(job, adapters=dataclasses.replace(job.adapters, targets=LINEARS))
    if set(job.adapters.targets) != set(LINEARS) and memory.of_job(everywhere, card).total <= SAFE * card.memory_gb:
        yield Advice(
            "peft.target_modules=all-linear",
            "adapters on all linear layers, experts included, come closest to training all weights; on attention "
            "alone they fall behind at any rank.",
            f"{_QLORA}; {_REGRET}",
        )
    if not data:
        return
    wanted, rank = int(data["tokens"]), _RANKS[-1]
    for rank in _RANKS:
        with_rank = dataclasses.replace(job.adapters, dim=rank)
        if 2 * trained_parameters(dataclasses.replace(job, adapters=with_rank)) >= wanted:
            break
    fitting = [r for r in _RANKS if r <= rank and _fits(job, card, r)]
    if rank != job.adapters.dim and fitting:
        yield Advice(
            f"peft.dim={fitting[-1]}",
            f"{wanted:,} tokens carry about one new bit each, and a parameter stores about two: this is the smallest "
            "rank with room for them. With a higher rank, quality hardly changes.",
            f"{_CAPACITY}; {_QLORA}; rule of thumb in between",
        )
    if wanted > 1_000_000_000:
        yield Advice(
            "peft=null", "above a billion tokens, LoRA stays behind training all weights at every rank tried.", _LESS
        )


def _fits(job: Workload, card: Card, rank: int) -> bool:
    assert job.adapters is not None
    trial = dataclasses.replace(job, adapters=dataclasses.replace(job.adapters, dim=rank))
    return memory.of_job(trial, card).total <= SAFE * card.memory_gb


def _learning_rate(job: Workload) -> Advice:
    if not job.adapters:
        return Advice("optim.config.lr=5e-6", "NeMo's recipes for training all weights.", "NeMo 2.0's Mixtral recipes")
    large = job.shape.hidden_size > 5000
    rate = "1e-4" if large or not job.adapters.quantized else "2e-4"
    return Advice(
        f"optim.config.lr={rate}",
        "about ten times the rate for training all weights, and the same for every rank; half of that for larger "
        "models.",
        f"{_REGRET}; {_QLORA}",
    )


def _batch(job: Workload, data: Mapping[str, Any]) -> Iterator[Advice]:
    batch, samples = job.batch, int(data["samples"])
    per_pack = batch.seq_length / float(data["mean_tokens"]) if batch.packed else 1.0
    steps = samples / max(per_pack, 1.0) / batch.global_batch_size
    if steps < 50:
        smallest = job.topology.data_parallel_size * batch.micro_batch_size
        fewer = max(smallest, 2 ** int(math.log2(max(samples / max(per_pack, 1.0) / 50, 1))))
        if fewer < batch.global_batch_size:
            yield Advice(
                f"data.global_batch_size={fewer}",
                f"a pass over the data is {steps:.0f} steps; with fewer than about 50, the learning-rate schedule has "
                "no room. Adapters lose more from large batches than full training does.",
                f"{_REGRET}; the number is a rule of thumb",
            )
    if not batch.packed and float(data["mean_tokens"]) < batch.seq_length / 2:
        yield Advice("--packed", "most of each padded sequence would be padding.", "arithmetic on the data's lengths")
    if samples < 50_000:
        yield Advice("", "two or three passes over so few samples; after that, validation loss rises.", "rule of thumb")
