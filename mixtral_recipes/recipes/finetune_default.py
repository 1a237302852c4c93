"""What every fine-tuning recipe begins with, with NeMo 2.0's values."""

from typing import Any

import nemo_run as run
import torch

from mixtral_recipes import api
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.recipes import defaults
from mixtral_recipes.recipes.catalog import PEFT_SCHEMES
from mixtral_recipes.recipes.log.default import FILENAME, tensorboard_logger
from mixtral_recipes.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.settings.log import NeMoLogger, TensorBoardLogger, WandbLogger
from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.settings.peft import ALL_LINEAR, DoRA, LoRA, QLoRA
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.trainer import Trainer


@returns_config
def default_finetune_recipe(
    model: run.Config[MixtralModel],
    resume_path: str | None,
    dir: str | None = None,
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    packed_sequence: bool = False,
    tokenizer: Any = "model",
) -> run.Partial[Any]:
    """Fine-tuning of all weights on SQuAD; set ``peft`` for adapters, ``data`` for something else.

    Args:
        model: The model.
        resume_path: Hub id whose import to start from (``nemo://ID``), a URL such as ``hf://ID``, or None.
        dir: Folder of runs.
        name: Run name.
        num_nodes: Nodes.
        num_gpus_per_node: Processes per node.
        packed_sequence: Whether samples are packed into full sequences.
        tokenizer: ``"model"``, ``"data"``, or a tokenizer's name.
    """
    return run.Partial(
        api.finetune,
        model=model,
        trainer=default_finetune_trainer(num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node),
        data=squad(2048, packed=packed_sequence, global_batch_size=8 if packed_sequence else 128),
        log=default_finetune_log(dir=dir, name=name, tensorboard_logger=tensorboard_logger(name=name)),
        optim=distributed_fused_adam_with_cosine_annealing(max_lr=1e-4, min_lr=0.0, warmup_steps=50, adam_beta2=0.98),
        resume=nemo_resume(resume_path),
        tokenizer=tokenizer,
    )


@returns_config
def default_finetune_trainer(
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 1,
    pipeline_parallelism_type: torch.dtype | None = torch.bfloat16,
    virtual_pipeline_parallelism: int | None = None,
    context_parallelism: int = 1,
    sequence_parallelism: bool = False,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    max_steps: int = 1000,
    limit_test_batches: int | None = None,
    limit_val_batches: int | None = None,
    val_check_interval: int = 30,
    *,
    topology: Topology | None = None,
) -> run.Config[Trainer]:
    """A fine-tuning trainer.

    Args:
        tensor_parallelism: Ranks that share each matrix.
        pipeline_parallelism: Consecutive groups of layers.
        pipeline_parallelism_type: Dtype sent between pipeline stages.
        virtual_pipeline_parallelism: Interleaved chunks per pipeline rank.
        context_parallelism: Ranks that share each sequence.
        sequence_parallelism: Whether tensor-parallel ranks split the sequence.
        num_nodes: Nodes.
        num_gpus_per_node: Processes per node.
        max_steps: Optimizer steps.
        limit_test_batches: No effect: there is no test loop.
        limit_val_batches: Global batches per validation; None uses the whole set.
        val_check_interval: Steps between validations.
        topology: All parallel sizes at once, instead.
    """
    config = defaults.trainer(
        topology
        or Topology(
            num_nodes * num_gpus_per_node,
            tensor_parallelism,
            pipeline_parallelism,
            virtual_pipeline_parallelism,
            context_parallelism,
            sequence_parallel=sequence_parallelism,
        ),
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=max_steps,
        pipeline_dtype=pipeline_parallelism_type,
    )
    config.limit_test_batches, config.limit_val_batches = limit_test_batches, limit_val_batches
    config.val_check_interval, config.log_every_n_steps = val_check_interval, 1
    strategy = config.strategy
    strategy.ckpt_async_save = strategy.ckpt_parallel_load = False
    strategy.ckpt_load_strictness = "log_all"
    strategy.ddp.overlap_grad_reduce = strategy.ddp.overlap_param_gather = False
    return config


@returns_config
def default_finetune_log(
    dir: str | None = None,
    name: str = "default",
    tensorboard_logger: run.Config[TensorBoardLogger] | None = None,
    wandb_logger: run.Config[WandbLogger] | None = None,
) -> run.Config[NeMoLogger]:
    """Checkpoint every 50 steps, keep 2. Arguments as `log.default.default_log`."""
    ckpt = run.Config(ModelCheckpoint, save_last="link", save_top_k=2, every_n_train_steps=50, filename=FILENAME)
    return run.Config(NeMoLogger, ckpt=ckpt, name=name, tensorboard=tensorboard_logger, wandb=wandb_logger, log_dir=dir)


@returns_config
def nemo_resume(model_id: str | None) -> run.Config[AutoResume]:
    """Start from an imported checkpoint, ``nemo://model_id``; a URL, or None, is taken as it is.

    Args:
        model_id: Hub id.
    """
    return _start_from(model_id if model_id is None or "://" in model_id else f"nemo://{model_id}")


@returns_config
def hf_resume(model_id: str) -> run.Config[AutoResume]:
    """Start from a Hugging Face model, which is imported first.

    Args:
        model_id: Hub id, or a folder.
    """
    return _start_from(f"hf://{model_id.removeprefix('hf://')}")


def _start_from(path: str | None) -> run.Config[AutoResume]:
    return run.Config(
        AutoResume,
        restore_config=run.Config(RestoreConfig, path=path),
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
    )


@returns_config
def squad(
    seq_length: int, *, packed: bool, global_batch_size: int, micro_batch_size: int = 1
) -> run.Config[SquadDataModule]:
    """SQuAD, padded or packed.

    Args:
        seq_length: Tokens per sequence, and per pack.
        packed: Whether samples are packed.
        global_batch_size: Sequences or packs per step.
        micro_batch_size: Sequences per forward pass.
    """
    specs = run.Config(PackedSequenceSpecs, packed_sequence_size=seq_length) if packed else None
    return run.Config(
        SquadDataModule,
        dataset_root=None,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        packed_sequence_specs=specs,
    )


@run.cli.factory(name="lora")
@returns_config
def lora() -> run.Config[LoRA]:
    """LoRA on all linear layers: ``peft=lora`` on nemo_run's command line."""
    return run.Config(LoRA)


@run.cli.factory(target=LoRA, name="dora")  # `peft` is a LoRA, and nemo_run looks by that class
@returns_config
def dora() -> run.Config[DoRA]:
    """DoRA on all linear layers: ``peft=dora`` on nemo_run's command line."""
    return run.Config(DoRA)


@run.cli.factory(target=LoRA, name="qlora")
@returns_config
def qlora() -> run.Config[QLoRA]:
    """LoRA on all linear layers over a base in 4 bits: ``peft=qlora`` on nemo_run's command line."""
    return run.Config(QLoRA)


def is_peft(scheme: str | None) -> bool:
    """Whether a scheme trains adapters.

    Raises:
        RecipeError: an unknown scheme.
    """
    scheme = (scheme or "none").lower()
    if scheme not in PEFT_SCHEMES:
        raise RecipeError(f"peft_scheme={scheme!r} is not supported.{nearest(scheme, PEFT_SCHEMES)}")
    return scheme != "none"


def adapter(scheme: str | None) -> run.Config[LoRA] | run.Config[DoRA] | run.Config[QLoRA] | None:
    """Adapters of dim 32 on all linear layers, experts included; None for full fine-tuning.

    NeMo's code adapts ``linear_qkv`` and ``linear_proj`` only while its documentation promises all linear layers; the
    preset ``attention`` (``peft.target_modules=attention``) is NeMo's choice.
    """
    if not is_peft(scheme):
        return None
    kind = {"dora": DoRA, "qlora": QLoRA}.get(str(scheme).lower(), LoRA)
    return run.Config(kind, target_modules=list(ALL_LINEAR), dim=32)
