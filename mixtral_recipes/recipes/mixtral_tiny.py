"""A 4-layer Mixtral that trains on a laptop's CPU: the model embedded in the package, its data, two processes."""

import json
from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch

from mixtral_recipes import embedded
from mixtral_recipes.api import finetune, pretrain
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
from mixtral_recipes.recipes import catalog, defaults, family
from mixtral_recipes.settings.trainer import Trainer

NAME = "mixtral_tiny"
ENTRY = catalog.entry(NAME)

# Found by trying (two cores, LoRA of dim 32 on all linear layers): see docs/recipes/mixtral_tiny.md.
PRETRAIN_LR = 3e-3
LORA_LR = 1e-3
FULL_LR = 5e-4
ADAM_EPS = 1e-8  # PyTorch's default, which the trials used; NeMo's 1e-5 is for models a thousand times larger
PRETRAIN_STEPS = 400
FINETUNE_STEPS = 120
GLOBAL_BATCH = 32
MICRO_BATCH = 16
PACKED_GLOBAL_BATCH = 8  # packs of 256 tokens, about two samples each


@run.cli.factory(name=NAME)
def model() -> run.Config[MixtralModel]:
    """The embedded model's shape, as its config.json says it."""
    published = json.loads((embedded.resolve("embedded://mixtral_tiny") / "config.json").read_text())
    config = run.Config(
        MixtralConfigTiny,
        vocab_size=published["vocab_size"],
        max_position_embeddings=published["max_position_embeddings"],
        rotary_base=published["rope_theta"],
    )
    return run.Config(MixtralModel, config=config, tokenizer="embedded://mixtral_tiny")


@run.cli.factory(name=NAME)
def trainer(
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 1,
    pipeline_parallelism_type: torch.dtype | None = None,
    virtual_pipeline_parallelism: int | None = None,
    context_parallelism: int = 1,
    sequence_parallelism: bool = False,
    expert_parallelism: int = 2,
    num_nodes: int = 1,
    num_gpus_per_node: int = 2,
    max_steps: int = FINETUNE_STEPS,
    callbacks: list[Any] | None = None,
    expert_tensor_parallelism: int | None = None,
) -> run.Config[Trainer]:
    """Two processes with four experts each, on the CPU or on GPUs, whichever is there."""
    config = family.trainer(**locals())
    _for_a_laptop(config)
    return config


def _for_a_laptop(config: run.Config[Trainer]) -> None:
    """Settings that suit a model of a few million parameters: nothing to hide communication behind."""
    config.accelerator = "auto"
    config.limit_val_batches = 4
    config.val_check_interval = 100
    config.log_every_n_steps = 10
    config.strategy.pipeline_dtype = None
    config.strategy.ckpt_async_save = config.strategy.ckpt_parallel_load = False
    config.strategy.ddp.overlap_grad_reduce = config.strategy.ddp.overlap_param_gather = False


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dir: str | None = None,
    name: str = "default",
    num_nodes: int | None = None,
    num_gpus_per_node: int | None = None,
    performance_mode: bool = False,
    fn: Callable[..., Any] = pretrain,
    *,
    precision: str = "fp32",
    hardware: str = "h100",
) -> run.Partial[Any]:
    """Pretrain the tiny model on the embedded sample's passages.

    Args:
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes 1.
        num_gpus_per_node: Processes per node; None takes 2.
        performance_mode: As for the large models.
        fn: What the recipe calls.
        precision: ``fp32``, ``bf16`` or ``fp8``.
        hardware: ``h100``, ``h200``, ``b200`` or ``gb200``, for FP8's scaling recipe.
    """
    recipe = family.pretrain(ENTRY, model(), **locals())
    _for_a_laptop(recipe.trainer)
    recipe.trainer.max_steps = PRETRAIN_STEPS
    recipe.data = run.Config(
        PreTrainingDataModule,
        paths="embedded://squad/pretraining.jsonl",
        seq_length=ENTRY.seq_length,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        split="98,2,0",
    )
    recipe.optim = defaults.adam_with_cosine_annealing(max_lr=PRETRAIN_LR, warmup_steps=40)
    recipe.optim.config.adam_eps = ADAM_EPS
    return recipe


@run.cli.factory(target=finetune, name=NAME)
def finetune_recipe(
    dir: str | None = None,
    name: str = "default",
    num_nodes: int | None = None,
    num_gpus_per_node: int | None = None,
    peft_scheme: str | None = "lora",
    packed_sequence: bool = False,
    *,
    precision: str = "fp32",
    hardware: str = "h100",
    instruct: bool = False,
) -> run.Partial[Any]:
    """Fine-tune the embedded model on the embedded SQuAD-format sample.

    Args:
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes; None takes 1.
        num_gpus_per_node: Processes per node; None takes 2.
        peft_scheme: ``lora``, ``dora``, or ``none`` (or None) for full fine-tuning.
        packed_sequence: Whether samples are packed into full sequences.
        precision: ``fp32``, ``bf16`` or ``fp8``.
        hardware: ``h100``, ``h200``, ``b200`` or ``gb200``, for FP8's scaling recipe.
        instruct: There is no Instruct variant of the tiny model.
    """
    recipe = family.finetune(ENTRY, model(), **locals())
    _for_a_laptop(recipe.trainer)
    recipe.trainer.max_steps = FINETUNE_STEPS
    recipe.data.dataset_root = "embedded://squad"
    if packed_sequence:
        recipe.data.global_batch_size = PACKED_GLOBAL_BATCH
    else:
        recipe.data.global_batch_size, recipe.data.micro_batch_size = GLOBAL_BATCH, MICRO_BATCH
    recipe.optim.config.lr = LORA_LR if defaults.is_peft(peft_scheme) else FULL_LR
    recipe.optim.config.adam_eps = ADAM_EPS
    recipe.optim.lr_scheduler.warmup_steps = 20
    recipe.log.ckpt.every_n_train_steps = None  # a run of a few minutes is saved at its end
    return recipe
