"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

from typing import Any, Protocol

from mixtral_recipes.system.packages import package


class ScalarWriter(Protocol):
    """Takes numbers by name."""

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write one step's numbers."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


def scalar_writers(log: Any) -> list[ScalarWriter]:
    """The writers a NeMoLogger asks for.

    Raises:
        EnvironmentProblem: the package of one is not installed.
    """
    asked = ((log.tensorboard, _TensorBoard), (log.wandb, _Wandb), (log.mlflow, _MLflow))
    return [writer(log) for settings, writer in asked if settings is not None]


def logger_package(name: str) -> Any:
    """The package of ``log.wandb`` or ``log.mlflow``.

    Raises:
        EnvironmentProblem: it is not installed, or cannot be imported.
    """
    return package(name, f"log.{name} is set, but {name} is not installed; run `pip install {name}`.")


class _TensorBoard:
    def __init__(self, log: Any) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(log.run_dir / log.tensorboard.save_dir / log.tensorboard.name))

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, log: Any) -> None:
        settings = log.wandb
        self._run = logger_package("wandb").init(
            project=settings.project,
            name=settings.name or log.name,
            entity=settings.entity,
            config=settings.config,
            dir=str(log.run_dir),
        )

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, log: Any) -> None:
        self._mlflow = logger_package("mlflow")
        if log.mlflow.tracking_uri is not None:
            self._mlflow.set_tracking_uri(log.mlflow.tracking_uri)
        self._mlflow.set_experiment(log.mlflow.experiment_name)
        self._mlflow.start_run(run_name=log.mlflow.run_name or log.name)

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
