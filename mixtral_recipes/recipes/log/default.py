"""Logging, checkpoints and resumption of the pretraining recipes, with NeMo 2.0's values."""

from datetime import timedelta

import nemo_run as run

from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger, TensorBoardLogger, WandbLogger
from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.settings.resume import AutoResume

FILENAME = "{model_name}--{val_loss:.2f}-{step}-{consumed_samples}"


@returns_config
def tensorboard_logger(name: str, save_dir: str = "tb_logs") -> run.Config[TensorBoardLogger]:
    """TensorBoard event files in ``RUN/save_dir/name``."""
    return run.Config(TensorBoardLogger, save_dir=save_dir, name=name)


@returns_config
def wandb_logger(project: str, name: str, entity: str | None = None) -> run.Config[WandbLogger]:
    """Weights & Biases."""
    config = run.Config(WandbLogger, project=project, name=name, config={})
    if entity is not None:
        config.entity = entity
    return config


@run.cli.factory(is_target_default=True)
@returns_config
def default_log(
    dir: str | None = None,
    name: str = "default",
    tensorboard_logger: run.Config[TensorBoardLogger] | None = None,
    wandb_logger: run.Config[WandbLogger] | None = None,
) -> run.Config[NeMoLogger]:
    """Checkpoint every 15 minutes, keep 10.

    Args:
        dir: Folder of runs.
        name: Run name.
        tensorboard_logger: TensorBoard; None writes none.
        wandb_logger: Weights & Biases; None does not log there.
    """
    ckpt = run.Config(
        ModelCheckpoint,
        save_last=True,
        save_top_k=10,
        train_time_interval=run.Config(timedelta, minutes=15),
        filename=FILENAME,
    )
    return run.Config(NeMoLogger, ckpt=ckpt, name=name, tensorboard=tensorboard_logger, wandb=wandb_logger, log_dir=dir)


@run.cli.factory(is_target_default=True)
@returns_config
def default_resume(resume_if_exists: bool = True, resume_ignore_no_checkpoint: bool = True) -> run.Config[AutoResume]:
    """Resume from the run's own newest checkpoint, else from scratch.

    Args:
        resume_if_exists: Whether to look for one.
        resume_ignore_no_checkpoint: Whether the run may start without one.
    """
    return run.Config(
        AutoResume,
        restore_config=None,
        resume_if_exists=resume_if_exists,
        resume_ignore_no_checkpoint=resume_ignore_no_checkpoint,
    )
