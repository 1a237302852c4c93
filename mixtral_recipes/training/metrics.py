"""Seeing a run: progress lines or a live bar, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from mixtral_recipes.training.checkpoint import ModelCheckpoint


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
class NeMoLogger:
    """Where a run writes, in NeMo's spelling: RUN is ``log_dir/name``.

    Attributes:
        name: The run's name.
        log_dir: Folder of runs.
        ckpt: Checkpoint policy; None saves at the end only.
        tensorboard: TensorBoard; None writes none.
        wandb: Weights & Biases; None does not log there.
    """

    name: str = "default"
    log_dir: str | None = None
    ckpt: ModelCheckpoint | None = None
    tensorboard: TensorBoardLogger | None = None
    wandb: WandbLogger | None = None

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.log_dir or "runs") / self.name


class RunLog:
    """Writes one run's metrics; silent on every rank but 0.

    On a terminal a bar shows the progress; elsewhere each logged step is a plain line.
    """

    def __init__(self, log: NeMoLogger, max_steps: int, *, is_writer: bool) -> None:
        self.max_steps = max_steps
        self.is_writer = is_writer
        self._file = self._tensorboard = self._wandb = self._progress = None
        if not is_writer:
            return
        log.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (log.run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        if log.tensorboard is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(log.run_dir / log.tensorboard.save_dir / log.tensorboard.name))
        if log.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(
                project=log.wandb.project,
                name=log.wandb.name or log.name,
                entity=log.wandb.entity,
                config=log.wandb.config,
                dir=str(log.run_dir),
            )
        if sys.stdout.isatty():
            self._progress = _Bar(max_steps)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self.is_writer:
            if self._progress:
                self._progress.bar.console.print(text, highlight=False)
            else:
                print(text, flush=True)

    def training(self, metrics: dict[str, Any], *, show: bool) -> None:
        """Record one training step; also show it when it is time for a line."""
        if not self.is_writer:
            return
        self._record("train", metrics)
        if self._progress:
            self._progress.update(metrics)
        elif show:
            print(self._line(metrics), flush=True)

    def validation(self, metrics: dict[str, Any]) -> None:
        """Record and show one validation."""
        self._record("val", metrics)
        self.say(f"step {metrics['step']}/{self.max_steps}  validation loss {metrics['val_loss']:.4f}")

    def _record(self, kind: str, metrics: dict[str, Any]) -> None:
        if self._file is None:
            return
        plain = {k: (v if not isinstance(v, float) or math.isfinite(v) else str(v)) for k, v in metrics.items()}
        self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **plain}) + "\n")
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, metrics["step"])
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=metrics["step"])

    def _line(self, m: dict[str, Any]) -> str:
        return (
            f"step {m['step']}/{self.max_steps}  loss {m['loss']:.4f}  grad norm {m['grad_norm']:.3f}  "
            f"lr {m['lr']:.2e}  {m['tokens_per_second']:,.0f} tokens/s  busiest expert {m['expert_imbalance']:.2f}x  "
            f"ETA {_clock(m['eta_seconds'])}"
        )

    def close(self) -> None:
        """Finish every writer."""
        for writer in (self._progress, self._tensorboard, self._file):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Bar:
    """A live bar on a terminal."""

    def __init__(self, max_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=max_steps, facts="")
        self.bar.start()

    def update(self, m: dict[str, Any]) -> None:
        facts = (
            f"loss {m['loss']:.4f}  grad norm {m['grad_norm']:.3f}  lr {m['lr']:.2e}  "
            f"{m['tokens_per_second']:,.0f} tokens/s"
        )
        self.bar.update(self.task, completed=m["step"], facts=facts)

    def close(self) -> None:
        self.bar.stop()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
