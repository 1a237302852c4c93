"""Mixtral 8x7B at 4096 tokens: pretraining on 64 GPUs, LoRA fine-tuning on one node."""

from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch

from mixtral_recipes.api import finetune, pretrain
from mixtral_recipes.models.config import MixtralConfig8x7B, MixtralModel
from mixtral_recipes.recipes import catalog, defaults, family
from mixtral_recipes.settings.trainer import Trainer

NAME = "mixtral_8x7b"
ENTRY = catalog.entry(NAME)


@run.cli.factory(name=NAME)
def model() -> run.Config[MixtralModel]:
    """Mixtral 8x7B with 4096 positions."""
    return run.Config(MixtralModel, config=run.Config(MixtralConfig8x7B))


@run.cli.factory(name=NAME)
def trainer(
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 4,
    pipeline_parallelism_type: torch.dtype | None = torch.bfloat16,
    virtual_pipeline_parallelism: int | None = 8,
    context_parallelism: int = 1,
    sequence_parallelism: bool = False,
    expert_parallelism: int = 8,
    num_nodes: int = 8,
    num_gpus_per_node: int = 8,
    max_steps: int = defaults.PRETRAIN_STEPS,
    callbacks: list[Any] | None = None,
    expert_tensor_parallelism: int | None = None,
) -> run.Config[Trainer]:
    """The pretraining trainer; `catalog` says where its layout comes from."""
    return family.trainer(**locals())


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: str | None = None,
    name: str = "default",
    num_nodes: int | None = None,
    num_gpus_per_node: int | None = None,
    performance_mode: bool = False,
    fn: Callable[..., Any] = pretrain,
    *,
    precision: str = "bf16",
    hardware: str = "h100",
) -> run.Partial[Any]:
    """Pretrain on random tokens; set ``data`` to train on text.

    Args:
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes the layout's (8 for H100).
        num_gpus_per_node: Processes per node; None takes the layout's.
        performance_mode: Whether to trade exact routing for speed (`family.apply_performance_mode`).
        fn: What the recipe calls.
        precision: ``bf16`` or ``fp8``.
        hardware: ``h100``, ``h200``, ``b200`` or ``gb200``: whose default layout is taken.
    """
    return family.pretrain(ENTRY, model(), **locals())


@run.cli.factory(target=finetune, name=NAME)
def finetune_recipe(
    dir: str | None = None,
    name: str = "default",
    num_nodes: int | None = None,
    num_gpus_per_node: int | None = None,
    peft_scheme: str | None = "lora",
    packed_sequence: bool = False,
    *,
    precision: str = "bf16",
    hardware: str = "h100",
    instruct: bool = False,
) -> run.Partial[Any]:
    """Fine-tune on SQuAD; set ``data`` to train on something else.

    Args:
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes the layout's (1 for adapters, 4 for all weights on H100).
        num_gpus_per_node: Processes per node; None takes the layout's.
        peft_scheme: ``lora``, ``dora``, or ``none`` (or None) for full fine-tuning.
        packed_sequence: Whether samples are packed into full sequences.
        precision: ``bf16`` or ``fp8``.
        hardware: ``h100``, ``h200``, ``b200`` or ``gb200``: whose default layout is taken.
        instruct: Whether to start from Mixtral-8x7B-Instruct.
    """
    return family.finetune(ENTRY, model(), **locals())
