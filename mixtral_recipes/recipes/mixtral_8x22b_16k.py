"""Mixtral 8x22B at 16,384 tokens: pretraining on 128 GPUs, LoRA fine-tuning on eight nodes."""

from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch

from mixtral_recipes.api import finetune, pretrain
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.recipes import catalog, defaults, family, mixtral_8x22b
from mixtral_recipes.settings.trainer import Trainer

NAME = "mixtral_8x22b_16k"
ENTRY = catalog.entry(NAME)


@run.cli.factory(name=NAME)
def model() -> run.Config[MixtralModel]:
    """Mixtral 8x22B with 16,384 positions."""
    config = mixtral_8x22b.model()
    config.config.seq_length = 16384
    config.config.max_position_embeddings = 16384
    return config


@run.cli.factory(name=NAME)
def trainer(
    tensor_parallelism: int = 4,
    pipeline_parallelism: int = 4,
    pipeline_parallelism_type: torch.dtype | None = torch.bfloat16,
    virtual_pipeline_parallelism: int | None = 14,
    context_parallelism: int = 4,
    sequence_parallelism: bool = True,
    expert_parallelism: int = 8,
    num_nodes: int = 16,
    num_gpus_per_node: int = 8,
    max_steps: int = defaults.PRETRAIN_STEPS,
    callbacks: list[Any] | None = None,
    expert_tensor_parallelism: int | None = 1,
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
        num_nodes: Nodes; None takes the layout's (16 for H100).
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
    """Fine-tune on SQuAD at 16,384 tokens per sequence; set ``data`` to train on something else.

    Args:
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes the layout's (8 for adapters, 16 for all weights on H100).
        num_gpus_per_node: Processes per node; None takes the layout's.
        peft_scheme: ``lora``, ``dora``, or ``none`` (or None) for full fine-tuning.
        packed_sequence: Whether samples are packed into full sequences.
        precision: ``bf16`` or ``fp8``.
        hardware: ``h100``, ``h200``, ``b200`` or ``gb200``: whose default layout is taken.
        instruct: Whether to start from Mixtral-8x22B-Instruct, whose vocabulary has 32,768 entries.
    """
    return family.finetune(ENTRY, model(), **locals())
