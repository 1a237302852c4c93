"""How a Mixtral recipe is put together; each recipe module adds its model, data and layouts."""

from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch

from mixtral_recipes import api
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.recipes import defaults
from mixtral_recipes.recipes.catalog import Layout, RecipeEntry
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.watch.callbacks import (
    GarbageCollectionCallback,
    MegatronCommOverlapCallback,
    MegatronTokenDropCallback,
)

LORA_LR = 1e-4  # NeMo 2.0: LoRA and DoRA
FULL_LR = 5e-6  # NeMo 2.0: full fine-tuning
# Instruct models whose vocabulary is not the base model's. Source: their config.json.
INSTRUCT_VOCABULARY = {"mistralai/Mixtral-8x22B-Instruct-v0.1": 32768}


def trainer(
    *,
    tensor_parallelism: int,
    pipeline_parallelism: int,
    pipeline_parallelism_type: torch.dtype | None,
    virtual_pipeline_parallelism: int | None,
    context_parallelism: int,
    sequence_parallelism: bool,
    expert_parallelism: int,
    expert_tensor_parallelism: int | None,
    num_nodes: int,
    num_gpus_per_node: int,
    max_steps: int,
    callbacks: list[Any] | None,
) -> run.Config[Trainer]:
    """A pretraining trainer from NeMo's argument names."""
    topology = Topology(
        num_nodes * num_gpus_per_node,
        tensor_parallelism,
        pipeline_parallelism,
        virtual_pipeline_parallelism,
        context_parallelism,
        expert_parallelism,
        expert_tensor_parallelism,
        sequence_parallelism,
    )
    return defaults.trainer(
        topology,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=max_steps,
        pipeline_dtype=pipeline_parallelism_type,
        callbacks=callbacks,
    )


def pretrain(
    entry: RecipeEntry,
    model: run.Config[MixtralModel],
    *,
    dir: str | None,
    name: str,
    num_nodes: int | None,
    num_gpus_per_node: int | None,
    performance_mode: bool,
    fn: Callable[..., Any],
    precision: str,
    hardware: str,
) -> run.Partial[Any]:
    """NeMo's pretraining: random tokens, 512 sequences per step, Adam 3e-4 -> 3e-5.

    Args:
        entry: The recipe's entry in the catalog.
        model: The model's config.
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes the layout's.
        num_gpus_per_node: Processes per node; None takes the layout's.
        performance_mode: Whether `apply_performance_mode` is applied.
        fn: What the recipe calls.
        precision: One of ``entry.precisions``.
        hardware: A key of `catalog.HARDWARE`.
    """
    layout = entry.layout("performance" if performance_mode else "pretrain", hardware)
    recipe = run.Partial(
        fn,
        model=model,
        trainer=defaults.trainer(
            layout.topology,
            num_nodes=num_nodes or layout.num_nodes,
            num_gpus_per_node=num_gpus_per_node or layout.num_gpus_per_node,
            max_steps=defaults.PRETRAIN_STEPS,
        ),
        data=run.Config(MockDataModule, seq_length=entry.seq_length, global_batch_size=512, micro_batch_size=1),
        log=defaults.pretrain_log(dir, name),
        optim=defaults.adam_with_cosine_annealing(max_lr=3e-4),
        resume=defaults.resume(),
    )
    recompute(recipe, layout)
    defaults.set_precision(recipe, precision, entry.precisions, hardware)
    if performance_mode:
        apply_performance_mode(recipe)
    return recipe


def finetune(
    entry: RecipeEntry,
    model: run.Config[MixtralModel],
    *,
    dir: str | None,
    name: str,
    num_nodes: int | None,
    num_gpus_per_node: int | None,
    peft_scheme: str | None,
    packed_sequence: bool,
    precision: str,
    hardware: str,
    instruct: bool,
) -> run.Partial[Any]:
    """NeMo's fine-tuning on SQuAD: 1000 steps, warmup 50, to a learning rate of 0.

    Args:
        entry: The recipe's entry in the catalog.
        model: The model's config.
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes the layout's.
        num_gpus_per_node: Processes per node; None takes the layout's.
        peft_scheme: ``lora``, ``dora``, or ``none`` (or None) for full fine-tuning.
        packed_sequence: Whether samples are packed into full sequences.
        precision: One of ``entry.precisions``.
        hardware: A key of `catalog.HARDWARE`.
        instruct: Whether to start from the Instruct variant.
    """
    peft = defaults.is_peft(peft_scheme)
    if instruct and entry.instruct in INSTRUCT_VOCABULARY:
        model.config.vocab_size = INSTRUCT_VOCABULARY[entry.instruct]
    layout = entry.layout("peft" if peft else "full_packed" if packed_sequence else "full", hardware)
    recipe = run.Partial(
        api.finetune,
        model=model,
        trainer=defaults.finetune_trainer(layout, num_nodes, num_gpus_per_node),
        data=defaults.squad(entry.finetune_seq_length, packed=packed_sequence),
        log=defaults.finetune_log(dir, name),
        optim=defaults.adam_with_cosine_annealing(
            max_lr=LORA_LR if peft else FULL_LR, min_lr=0.0, warmup_steps=50, adam_beta2=0.98
        ),
        resume=defaults.resume(starting_weights(entry, instruct), restore=True),
        peft=defaults.adapter(peft_scheme),
        tokenizer="model",
    )
    recompute(recipe, layout)
    defaults.set_precision(recipe, precision, entry.precisions, hardware)
    return recipe


def starting_weights(entry: RecipeEntry, instruct: bool) -> str | None:
    """Where fine-tuning starts: ``nemo://ID`` (imported beforehand, as in NeMo), or the embedded model.

    None where nobody publishes the model.

    Raises:
        RecipeError: there is no Instruct variant.
    """
    if not instruct:
        if entry.base is None:
            return None
        return entry.base if "://" in entry.base else f"nemo://{entry.base}"
    if entry.instruct is None:
        raise RecipeError(f"instruct=True: {entry.name} has no Instruct variant; use instruct=False.")
    return f"nemo://{entry.instruct}"


def recompute(recipe: run.Partial[Any], layout: Layout) -> None:
    """Recompute every layer in the backward pass where the layout's memory needs it."""
    if layout.recompute:
        recipe.model.config.recompute_granularity = "full"
        recipe.model.config.recompute_method = "uniform"
        recipe.model.config.recompute_num_layers = 1


def apply_performance_mode(recipe: run.Partial[Any]) -> None:
    """NeMo's performance mode: token drop, communication overlap, scheduled collections, bf16 gradient reduction.

    Its layout (tensor-parallel experts) is the catalog's. Token drop changes the result: tokens beyond an expert's
    even share skip it.

    Args:
        recipe: The pretraining recipe to change.
    """
    recipe.trainer.callbacks.extend(
        [
            run.Config(MegatronTokenDropCallback, moe_expert_capacity_factor=1.0),
            run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
            # NeMo leaves the overlap with the optimizer step off because of checkpointing.
            run.Config(MegatronCommOverlapCallback, overlap_param_gather_with_optimizer_step=False),
        ]
    )
    recipe.trainer.plugins.grad_reduce_in_fp32 = False
