"""Where a run writes, in NeMo's spelling."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class TensorBoardLogger:
    """TensorBoard event files.

    Attributes:
        save_dir: Folder inside the run's folder.
        name: Folder inside ``save_dir``.
    """

    save_dir: str = "tb_logs"
    name: str = "default"


@takes_nemos_arguments
@dataclass
class WandbLogger:
    """Weights & Biases, when the ``wandb`` package is installed.

    Attributes:
        project: Project.
        name: Run name.
        entity: Team or user.
        config: Values to record with the run.
    """

    project: str = "mixtral-recipes"
    name: str | None = None
    entity: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class MLFlowLogger:
    """MLflow, when the ``mlflow`` package is installed.

    Attributes:
        experiment_name: Experiment.
        run_name: Run name; None uses the run's.
        tracking_uri: Server or folder; None uses MLflow's own default.
    """

    experiment_name: str = "mixtral-recipes"
    run_name: str | None = None
    tracking_uri: str | None = None


@takes_nemos_arguments
@dataclass
class NeMoLogger:
    """Where a run writes, in NeMo's spelling: RUN is ``log_dir/name``.

    Attributes:
        name: The run's name.
        log_dir: Folder of runs.
        explicit_log_dir: RUN itself; `log_dir` and `version` are then ignored.
        version: A folder below that becomes RUN: ``log_dir/name/version``.
        files_to_copy: Files that are copied into RUN when it starts.
        ckpt: Checkpoint policy; None saves at the end only.
        tensorboard: TensorBoard; None writes none.
        wandb: Weights & Biases; None does not log there.
        mlflow: MLflow; None does not log there.
    """

    name: str = "default"
    log_dir: str | None = None
    explicit_log_dir: str | None = None
    version: str | None = None
    files_to_copy: list[str] | None = None
    ckpt: ModelCheckpoint | None = None
    tensorboard: TensorBoardLogger | None = None
    wandb: WandbLogger | None = None
    mlflow: MLFlowLogger | None = None

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return run_folder(self)


def run_folder(log: Any) -> Path:
    """The folder of the run that a NeMoLogger, or a config of one, speaks of."""
    if explicit := getattr(log, "explicit_log_dir", None):  # a log of one's own may have none
        return Path(explicit).expanduser()
    return Path(log.log_dir or "runs", log.name, getattr(log, "version", None) or "").expanduser()
