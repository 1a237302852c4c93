"""The parts recipes share: trainer, precision, optimizer, logging, resumption, fine-tuning data and adapters.

Values are NeMo 2.0's recipes' where nothing else is said (nemo/collections/llm/recipes: `log/default.py`,
`optim/adam.py`, `finetune_default.py`, `precision/mixed_precision.py`).
"""

from datetime import timedelta
from typing import Any

import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.recipes.catalog import PEFT_SCHEMES, Layout, RecipeEntry
from mixtral_recipes.settings import serialization as _serialization  # noqa: F401  # teaches nemo_run dtypes, X | None
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.settings.log import NeMoLogger, TensorBoardLogger
from mixtral_recipes.settings.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training.watch.callbacks import TimingCallback


def trainer(
    topology: Topology,
    *,
    num_nodes: int,
    num_gpus_per_node: int,
    max_steps: int,
    pipeline_dtype: torch.dtype | None = torch.bfloat16,
    callbacks: list[Any] | None = None,
) -> run.Config[Trainer]:
    """A pretraining trainer.

    Args:
        topology: The parallel sizes; its world size is not read.
        num_nodes: Nodes.
        num_gpus_per_node: Processes per node.
        max_steps: Optimizer steps.
        pipeline_dtype: Dtype sent between pipeline stages.
        callbacks: Callback configs; None takes `TimingCallback`.
    """
    strategy = run.Config(
        MegatronStrategy,
        **topology.settings(),
        pipeline_dtype=pipeline_dtype,
        gradient_as_bucket_view=True,
        ckpt_async_save=True,
        ckpt_parallel_load=True,
        ddp=run.Config(
            DistributedDataParallelConfig,
            check_for_nan_in_grad=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            # NeMo has True. The loop divides the summed gradient by the label tokens of the global batch, which an
            # average taken inside the collective would contradict.
            average_in_collective=False,
        ),
    )
    return run.Config(
        Trainer,
        accelerator="gpu",
        accumulate_grad_batches=1,
        callbacks=callbacks if callbacks is not None else [run.Config(TimingCallback)],
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        max_steps=max_steps,
        limit_test_batches=50,
        limit_val_batches=32,
        val_check_interval=2000,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        plugins=bf16_mixed(),
        strategy=strategy,
    )


def finetune_trainer(layout: Layout, max_steps: int) -> run.Config[Trainer]:
    """A fine-tuning trainer: validation every 30 steps."""
    config = trainer(
        layout.topology,
        num_nodes=layout.num_nodes,
        num_gpus_per_node=layout.num_gpus_per_node,
        max_steps=max_steps,
    )
    config.limit_test_batches = config.limit_val_batches = None
    config.val_check_interval = 30
    config.log_every_n_steps = 1
    config.strategy.ckpt_async_save = config.strategy.ckpt_parallel_load = False
    config.strategy.ckpt_load_strictness = "log_all"
    config.strategy.ddp.overlap_grad_reduce = config.strategy.ddp.overlap_param_gather = False
    return config


def bf16_mixed() -> run.Config[MegatronMixedPrecision]:
    """bf16 weights and activations, fp32 master weights."""
    return run.Config(MegatronMixedPrecision, precision="bf16-mixed")


def fp32() -> run.Config[MegatronMixedPrecision]:
    """Everything in fp32."""
    return run.Config(MegatronMixedPrecision, precision="32")


def fp8_mixed(hardware: str) -> run.Config[MegatronMixedPrecision]:
    """bf16 with matrix products in FP8: delayed scaling on Hopper, MXFP8 on Blackwell.

    Args:
        hardware: A card's name (`planner/cards.py`).
    """
    config = bf16_mixed()
    config.fp8 = "hybrid"
    config.fp8_param_gather = True
    config.fp8_recipe = "mxfp8" if hardware in ("b200", "gb200") else "delayed"
    return config


def set_precision(recipe: run.Partial, precision: str, choices: tuple[str, ...], hardware: str) -> None:
    """Put a precision choice into a recipe.

    Args:
        recipe: The recipe to change.
        precision: ``bf16``, ``fp8`` or ``fp32``.
        choices: The choices this recipe offers.
        hardware: A card's name (`planner/cards.py`).

    Raises:
        RecipeError: a precision the recipe does not offer.
    """
    if precision not in choices:
        raise RecipeError(f"precision={precision!r} is not offered.{nearest(precision, choices)}")
    if precision == "fp8":
        recipe.trainer.plugins = fp8_mixed(hardware)
        if recipe.trainer.plugins.fp8_recipe == "mxfp8":  # NeMo: bf16_with_mxfp8_mixed
            recipe.trainer.strategy.ddp.reuse_grad_buf_for_mxfp8_param_ag = True
            recipe.optim.config.reuse_grad_buf_for_mxfp8_param_ag = True
    else:
        recipe.trainer.plugins = fp32() if precision == "fp32" else bf16_mixed()


def adam_with_cosine_annealing(
    *, max_lr: float, min_lr: float | None = None, warmup_steps: int = 2000, adam_beta2: float = 0.95
) -> run.Config[MegatronOptimizerModule]:
    """Distributed Adam with warmup and cosine decay.

    Args:
        max_lr: Peak learning rate.
        min_lr: Where the cosine ends; None takes a tenth of the peak.
        warmup_steps: Steps of linear warmup.
        adam_beta2: Decay of the second moment.
    """
    return run.Config(
        MegatronOptimizerModule,
        config=run.Config(
            OptimizerConfig,
            optimizer="adam",
            lr=max_lr,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=adam_beta2,
            adam_eps=1e-5,
            use_distributed_optimizer=True,
            clip_grad=1.0,
        ),
        lr_scheduler=run.Config(
            CosineAnnealingScheduler,
            warmup_steps=warmup_steps,
            constant_steps=0,
            min_lr=0.1 * max_lr if min_lr is None else min_lr,
        ),
    )


def pretrain_log(dir: str | None, name: str) -> run.Config[NeMoLogger]:
    """Checkpoint every 15 minutes, keep 10."""
    ckpt = run.Config(
        ModelCheckpoint, save_last=True, save_top_k=10, train_time_interval=run.Config(timedelta, minutes=15)
    )
    return _log(dir, name, ckpt)


def finetune_log(dir: str | None, name: str) -> run.Config[NeMoLogger]:
    """Checkpoint every 50 steps, keep 2."""
    return _log(dir, name, run.Config(ModelCheckpoint, save_last="link", save_top_k=2, every_n_train_steps=50))


def _log(dir: str | None, name: str, ckpt: run.Config[ModelCheckpoint]) -> run.Config[NeMoLogger]:
    ckpt.filename = "{model_name}--{val_loss:.2f}-{step}-{consumed_samples}"
    tensorboard = run.Config(TensorBoardLogger, save_dir="tb_logs", name=name)
    return run.Config(NeMoLogger, ckpt=ckpt, name=name, tensorboard=tensorboard, wandb=None, log_dir=dir)


def resume(path: str | None = None, *, restore: bool = False) -> run.Config[AutoResume]:
    """Resume from the run's own newest checkpoint, else start from ``path``, else from scratch.

    Args:
        path: Weights to start from.
        restore: Whether there must be weights to start from, named here or later.
    """
    restore_config = run.Config(RestoreConfig, path=path) if restore else None
    return run.Config(
        AutoResume, restore_config=restore_config, resume_if_exists=True, resume_ignore_no_checkpoint=True
    )


def squad(entry: RecipeEntry, *, packed: bool, dataset_root: str | None = None) -> run.Config[SquadDataModule]:
    """SQuAD, padded or packed.

    Args:
        entry: The recipe: tokens per sequence, and per pack; sequences or packs per step.
        packed: Whether samples are packed.
        dataset_root: A file, folder or ``embedded://squad``; None takes the Hub's.
    """
    seq_length = entry.finetune_seq_length
    specs = run.Config(PackedSequenceSpecs, packed_sequence_size=seq_length) if packed else None
    return run.Config(
        SquadDataModule,
        dataset_root=dataset_root,
        seq_length=seq_length,
        global_batch_size=entry.packed_batch if packed else entry.finetune_batch,
        micro_batch_size=1 if packed else entry.micro_batch,
        packed_sequence_specs=specs,
    )


def is_peft(scheme: str | None) -> bool:
    """Whether a scheme trains adapters.

    Raises:
        RecipeError: an unknown scheme.
    """
    scheme = (scheme or "none").lower()
    if scheme not in PEFT_SCHEMES:
        raise RecipeError(f"peft_scheme={scheme!r} is not known.{nearest(scheme, PEFT_SCHEMES)}")
    return scheme != "none"


def adapter(scheme: str | None) -> run.Config[LoRA] | run.Config[DoRA] | None:
    """Adapters of dim 32 on all linear layers, experts included; None for full fine-tuning.

    NeMo's code adapts ``linear_qkv`` and ``linear_proj`` only while its documentation promises all linear layers; the
    preset ``attention`` (``peft.target_modules=attention``) is NeMo's choice.
    """
    if not is_peft(scheme):
        return None
    layers = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    return run.Config(DoRA if str(scheme).lower() == "dora" else LoRA, target_modules=layers, dim=32)
