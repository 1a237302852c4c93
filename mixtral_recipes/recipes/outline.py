"""A recipe in outline: the settings that decide memory and time, under the recipe's own paths, without torch.

`plan`, `recipes list` and the default layouts start from it, so that an answer takes a fraction of a second. A test
compares it with what the recipes build.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.search import SAFE, search
from mixtral_recipes.planner.verdict import leanest
from mixtral_recipes.planner.workload import LINEARS, Workload
from mixtral_recipes.recipes import catalog
from mixtral_recipes.recipes.catalog import PEFT_SCHEMES, Layout, RecipeEntry
from mixtral_recipes.settings.precision import MegatronMixedPrecision


@dataclasses.dataclass(frozen=True)
class Question:
    """Which recipe, with which arguments of its function.

    Attributes:
        recipe: Its name.
        task: ``pretrain`` or ``finetune``.
        hardware: A card's name.
        num_nodes: Nodes; None uses the layout's.
        num_gpus_per_node: GPUs of each; None uses the layout's.
        precision: ``bf16``, ``fp8`` or ``fp32``; None uses the recipe's first.
        peft_scheme: Of fine-tuning.
        packed_sequence: Of fine-tuning.
        performance_mode: Of pretraining.
    """

    recipe: str
    task: str = "finetune"
    hardware: str = "h100"
    num_nodes: int | None = None
    num_gpus_per_node: int | None = None
    precision: str | None = None
    peft_scheme: str = "lora"
    packed_sequence: bool = False
    performance_mode: bool = False

    @property
    def layout_task(self) -> str:
        """Under which task the catalog has the layout."""
        if self.task == "pretrain":
            return "performance" if self.performance_mode else "pretrain"
        if self.peft_scheme != "none":
            return "peft"
        return "full_packed" if self.packed_sequence else "full"


def outline(asked: Question) -> Any:
    """A recipe's settings, in objects with the recipe's attribute names.

    Raises:
        RecipeError: an unknown recipe, precision, scheme or card.
    """
    return _in_layout(asked, default_layout(asked))


@functools.lru_cache(maxsize=256)
def default_layout(asked: Question) -> Layout:
    """The layout that a recipe takes.

    On the card and number of GPUs that the catalog has a layout for, that one. On other numbers, the same axes with
    more or fewer copies of the model if that runs and fits; else the fastest that fits, by search. If none fits, the
    leanest, so that preflight can say what bursts.

    Raises:
        RecipeError: an unknown recipe or card.
    """
    entry, card = catalog.entry(asked.recipe), cards.card(asked.hardware)
    known = entry.layout(asked.layout_task, asked.hardware if asked.hardware in catalog.HARDWARE else "h100")
    nodes, gpus = asked.num_nodes or known.num_nodes, asked.num_gpus_per_node or known.num_gpus_per_node
    world_size = nodes * gpus
    if asked.hardware in catalog.HARDWARE and (nodes, gpus) == (known.num_nodes, known.num_gpus_per_node):
        return known
    same = dataclasses.replace(known.topology, world_size=world_size)
    if not entry.needs_gpu:
        return dataclasses.replace(known, num_nodes=nodes, num_gpus_per_node=gpus, topology=same)
    why = f"The layout for {known.topology.world_size} GPUs, with more or fewer copies of the model."
    copied = dataclasses.replace(known, num_nodes=nodes, num_gpus_per_node=gpus, topology=same, why=why)
    job = Workload.of(_in_layout(asked, copied))
    if not violations(same, job.shape, job.batch) and memory.of_job(job, card).total <= SAFE * card.memory_gb:
        return copied
    found = list(search(job, card, world_size))
    if not found:
        nearest = leanest(job, card)
        topology = nearest.job.topology if nearest else same
        return dataclasses.replace(copied, topology=topology, why=f"No layout fits {world_size} {card.title}.")
    best = found[0]
    why = f"The fastest of {len(found)} layouts that fit {world_size} {card.title}, according to the planner."
    return Layout(nodes, gpus, best.job.topology, bool(best.job.recompute.granularity), why)


def job_of(asked: Question) -> Workload:
    """The job that a recipe describes."""
    return Workload.of(outline(asked))


def _in_layout(asked: Question, layout: Layout) -> Any:
    entry = catalog.entry(asked.recipe)
    if asked.peft_scheme not in PEFT_SCHEMES:
        raise RecipeError(f"peft_scheme={asked.peft_scheme!r} is not supported; use {', '.join(PEFT_SCHEMES)}.")
    tunes = asked.task == "finetune"
    if tunes and asked.peft_scheme == "qlora" and asked.precision == "fp8":
        raise RecipeError(
            "precision='fp8' does not work with peft_scheme='qlora', whose base is in 4 bits; use 'bf16'."
        )
    return SimpleNamespace(
        model=SimpleNamespace(config=_config(entry, layout)),
        trainer=_trainer(asked, entry, layout),
        data=_data(asked, entry),
        log=SimpleNamespace(ckpt=SimpleNamespace(save_top_k=2 if tunes else 10)),
        optim=SimpleNamespace(config=SimpleNamespace(use_distributed_optimizer=True)),
        peft=_peft(asked) if tunes else None,
        __name__=asked.task,
    )


def _config(entry: RecipeEntry, layout: Layout) -> SimpleNamespace:
    shape = dataclasses.asdict(entry.shape)
    return SimpleNamespace(
        **shape,
        moe_ffn_hidden_size=None,
        moe_router_topk=2,
        moe_expert_capacity_factor=None,
        attention_backend="auto",
        accelerate=True,
        gradient_accumulation_fusion=None,
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
        recompute_modules=None,
    )


def _trainer(asked: Question, entry: RecipeEntry, layout: Layout) -> SimpleNamespace:
    tunes, fast = asked.task == "finetune", asked.performance_mode and asked.task == "pretrain"
    precision = asked.precision or entry.precisions[0]
    if precision not in entry.precisions:
        raise RecipeError(f"precision={precision!r} is not supported; use {' or '.join(entry.precisions)}.")
    fp8, blackwell = precision == "fp8", asked.hardware in ("b200", "gb200")
    topology = layout.topology
    if not entry.needs_gpu:
        spread = math.gcd(topology.expert_model_parallel_size, topology.world_size)
        topology = dataclasses.replace(topology, expert_model_parallel_size=spread)
    overlap = entry.needs_gpu and (not tunes)
    drop = SimpleNamespace(moe_expert_capacity_factor=1.0)
    return SimpleNamespace(
        accelerator="gpu" if entry.needs_gpu else "auto",
        num_nodes=layout.num_nodes,
        devices=layout.num_gpus_per_node,
        max_steps=entry.finetune_steps if tunes else entry.pretrain_steps,
        callbacks=[drop] if fast else [],
        plugins=MegatronMixedPrecision(
            precision="32" if precision == "fp32" else "bf16-mixed",
            grad_reduce_in_fp32=False if fast else None,
            fp8="hybrid" if fp8 else None,
            fp8_recipe="mxfp8" if fp8 and blackwell else "delayed",
            fp8_param_gather=(True if blackwell else None) if fp8 else False,
        ),
        strategy=SimpleNamespace(
            **topology.settings(),
            ddp=SimpleNamespace(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
                data_parallel_sharding_strategy="no_shard",
            ),
        ),
    )


def _data(asked: Question, entry: RecipeEntry) -> SimpleNamespace:
    if asked.task == "pretrain":
        length, batch, packed = entry.seq_length, entry.pretrain_batch, False
    else:
        length, packed = entry.finetune_seq_length, asked.packed_sequence
        batch = entry.packed_batch if packed else entry.finetune_batch
    return SimpleNamespace(
        seq_length=length,
        global_batch_size=batch,
        micro_batch_size=1 if packed else entry.micro_batch,
        packed_sequence_specs=SimpleNamespace(packed_sequence_size=length) if packed else None,
    )


def _peft(asked: Question) -> SimpleNamespace | None:
    if asked.peft_scheme == "none":
        return None
    fields = {"dim": 32, "alpha": 32, "target_modules": list(LINEARS), "exclude_modules": []}
    if asked.peft_scheme == "qlora":
        fields["bits"] = 4
    return SimpleNamespace(scheme=asked.peft_scheme, **fields)
