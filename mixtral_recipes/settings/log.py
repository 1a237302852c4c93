"""Where a run writes, in NeMo's spelling."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_recipes.settings.checkpoint import ModelCheckpoint


@dataclass
class TensorBoardLogger:
    """TensorBoard event files.

    Attributes:
        save_dir: Folder below the run's.
        name: Folder below that.
    """

    save_dir: str = "tb_logs"
    name: str = "default"


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
        run_name: Run name; None takes the run's.
        tracking_uri: Server or folder; None takes MLflow's own default.
    """

    experiment_name: str = "mixtral-recipes"
    run_name: str | None = None
    tracking_uri: str | None = None


@dataclass
class NeMoLogger:
    """Where a run writes, in NeMo's spelling: RUN is ``log_dir/name``.

    Attributes:
        name: The run's name.
        log_dir: Folder of runs.
        ckpt: Checkpoint policy; None saves at the end only.
        tensorboard: TensorBoard; None writes none.
        wandb: Weights & Biases; None does not log there.
        mlflow: MLflow; None does not log there.
    """

    name: str = "default"
    log_dir: str | None = None
    ckpt: ModelCheckpoint | None = None
    tensorboard: TensorBoardLogger | None = None
    wandb: WandbLogger | None = None
    mlflow: MLFlowLogger | None = None

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.log_dir or "runs") / self.name
