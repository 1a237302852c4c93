"""The layout of an AutoModel file, and what it leaves open: nodes and microbatches."""

import itertools
import math
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.rules import violations
from mixtral_recipes.overrides.automodel.values import Values
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.workload import Workload

_MOST_NODES = 64


def processes_of(values: Values, num_nodes: int | None, gpus: int | None) -> tuple[int | None, int | None]:
    """Nodes and processes per node: those given, else the file's; None where it does not say."""
    if values.take("distributed.dp_size") is None or num_nodes or gpus:
        return num_nodes, gpus
    world = values.size("dp") * values.size("tp") * values.size("pp") * values.size("cp")
    return (1, world) if world <= 8 else (-(-world // 8), 8)


def set_layout(values: Values, recipe: Any, packed: bool) -> None:
    """Parallel sizes and microbatches."""
    strategy, trainer = recipe.trainer.strategy, recipe.trainer
    tp, pp, cp = (values.size(letter) for letter in ("tp", "pp", "cp"))
    strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size = tp, pp
    strategy.context_parallel_size = cp
    strategy.expert_tensor_parallel_size = 1
    strategy.sequence_parallel = tp > 1
    if not values.take("distributed.sequence_parallel", False) and tp > 1:
        values.notes.append("Sequence parallelism is on because Megatron's MoE layer needs it with tp_size > 1.")
    strategy.virtual_pipeline_model_parallel_size = _chunks(values, recipe.model.config.num_layers, pp)
    if pp == 1:
        strategy.pipeline_dtype = None
    if values.take("distributed.activation_checkpointing"):
        config = recipe.model.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    local = values.whole("step_scheduler.local_batch_size", 1)
    micro = values.whole("distributed.pipeline.pp_microbatch_size", 1)
    recipe.data.micro_batch_size = 1 if packed else micro if pp > 1 else local
    if packed and (local > 1 or micro > 1):
        values.notes.append("Packs are processed one at a time, whatever step_scheduler.local_batch_size is.")
    _spread_experts(values, trainer)


def _chunks(values: Values, num_layers: int, pp: int) -> int | None:
    """Interleaved chunks per pipeline rank."""
    schedule = str(values.take("distributed.pipeline.pp_schedule", "1f1b")).lower()
    stage = values.whole("distributed.pipeline.layers_per_stage", 0, least=0)
    if pp == 1 or schedule == "1f1b":
        return None
    if schedule != "interleaved1f1b":
        raise RecipeError(f"distributed.pipeline.pp_schedule={schedule} is not supported; use 1f1b or interleaved1f1b.")
    return num_layers // (pp * stage) if stage else 2  # AutoModel's default: two stages a rank


def _spread_experts(values: Values, trainer: Any) -> None:
    """Spread the experts as the file says, else over as many ranks as there are: FSDP would have sharded them."""
    asked = values.whole("distributed.ep_size", 0, least=0)
    world = trainer.num_nodes * trainer.devices
    most = world // trainer.strategy.pipeline_model_parallel_size
    trainer.strategy.expert_model_parallel_size = asked or math.gcd(8, max(most, 1))


def make_it_fit(values: Values, recipe: Any, hardware: str, nodes: int | None) -> None:
    """What the file leaves open: the fewest nodes on which the layout divides and fits, and with them microbatches.

    Smaller microbatches change nothing but speed: the global batch stays.
    """
    trainer, card, asked = recipe.trainer, cards.card(hardware), recipe.data.micro_batch_size
    choices = [nodes] if nodes else [2**power for power in range(_MOST_NODES.bit_length())]
    sizes = [asked >> power for power in range(asked.bit_length())]
    before = trainer.num_nodes
    for count, size in itertools.product(choices, sizes):
        trainer.num_nodes, recipe.data.micro_batch_size = count, size
        _spread_experts(values, trainer)
        job = Workload.of(recipe)
        if not violations(job.topology, job.shape, job.batch) and memory.of_job(job, card).fits:
            break
    else:  # preflight says what is wrong
        trainer.num_nodes, recipe.data.micro_batch_size = before, asked
        _spread_experts(values, trainer)
        return
    if nodes is None:
        where = f"{trainer.num_nodes} node(s) x {trainer.devices} {card.title}"
        values.notes.append(
            f"Using {where}, since the file does not set them; --num-nodes and --nproc-per-node override this."
        )
    if recipe.data.micro_batch_size != asked:
        values.notes.append(
            f"{recipe.data.micro_batch_size} sequence(s) per microbatch instead of {asked}, so that they fit in memory."
        )
