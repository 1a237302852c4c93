"""A run's logging: progress lines or a live bar, metrics.jsonl, TensorBoard, Weights & Biases, MLflow."""

import contextlib
import json
import math
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.system.files import naming
from mixtral_recipes.system.progress import terminal_bar
from mixtral_recipes.training.watch.writers import scalar_writers

if TYPE_CHECKING:
    from rich.progress import Progress

_WORTH_SAYING = 0.02  # of a step that was spent waiting for data


class RunLog:
    """Writes one run's metrics; silent on every rank but 0.

    On a terminal a bar shows the progress; elsewhere each logged step is a plain line.

    Attributes:
        run_dir: The run's folder.
    """

    def __init__(self, log: NeMoLogger, max_steps: int, *, is_writer: bool) -> None:
        """Open every writer that was asked for.

        Raises:
            EnvironmentProblem: its package is not installed.
        """
        self.run_dir = log.run_dir
        self.max_steps = max_steps
        self.is_writer = is_writer
        self._file: TextIO | None = None
        self._scalars: list[Any] = []
        self._bar: Progress | None = None
        if not is_writer:
            return
        log.run_dir.mkdir(parents=True, exist_ok=True)
        for file in log.files_to_copy or ():
            shutil.copy2(file, log.run_dir)
        self._scalars = scalar_writers(log)
        self._file = (log.run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._bar = terminal_bar("steps", sys.stdout, stays=True)
        if self._bar:
            self._bar.add_task("training", total=max_steps, facts="")
            self._bar.start()

    def say(self, text: str) -> None:
        """One line for the reader."""
        if not self.is_writer:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def event(self, kind: str, facts: dict[str, Any]) -> None:
        """Record something that is not a metric of a step: how the run started, a save, how it ended."""
        if self._file is not None:
            plain = {k: (v if not isinstance(v, float) or math.isfinite(v) else str(v)) for k, v in facts.items()}
            line = json.dumps({"kind": kind, "time": round(time.time(), 3), **plain}, default=str) + "\n"
            with naming(Path(self._file.name)):
                self._file.write(line)

    def training(self, metrics: dict[str, Any], *, show: bool) -> None:
        """Record one training step; also show it when it is time for a line."""
        self._record("train", metrics)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=metrics["step"], facts=summary(metrics))
        elif show and self.is_writer:
            left = timedelta(seconds=round(metrics["eta_seconds"]))
            print(f"step {metrics['step']}/{self.max_steps}  {summary(metrics)}  ETA {left}", flush=True)

    def validation(self, metrics: dict[str, Any]) -> None:
        """Record and show one validation."""
        self._record("val", metrics)
        told = f"validation loss {metrics['val_loss']:.4f}{_by_source(metrics, 'val_loss/')}"
        self.say(f"step {metrics['step']}/{self.max_steps}  {told}")

    def _record(self, kind: str, metrics: dict[str, Any]) -> None:
        self.event(kind, metrics)
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "step" and math.isfinite(value)
        }
        for writer in self._scalars:
            writer.write(numbers, metrics["step"])

    def fail(self, error: Exception) -> None:
        """Record what ended the run, and finish; where a full disk prevents that, the error itself says more."""
        with contextlib.suppress(OSError):
            self.event("end", {"error": f"{type(error).__name__}: {error}"})
        with contextlib.suppress(OSError):
            self.close()

    def close(self) -> None:
        """Finish every writer. Can be called twice."""
        if self._bar:
            self._bar.stop()
        writers = (*self._scalars, self._file)
        self._scalars, self._bar, self._file = [], None, None
        for writer in writers:
            if writer is not None:
                writer.close()


def _by_source(m: dict[str, Any], start: str) -> str:
    """The loss of each source of a mixture, in parentheses."""
    found = [f"{name.removeprefix(start)} {loss:.4f}" for name, loss in m.items() if name.startswith(start)]
    return f" ({', '.join(found)})" if found else ""


def summary(m: dict[str, Any]) -> str:
    """One step's metrics in a line."""
    dropped = f"  dropped {m['dropped_share']:.1%}" if m.get("dropped_share") else ""
    waited = m.get("data_wait_seconds", 0.0) / m.get("seconds", 1.0)
    data = f"  waited {waited:.0%} for data" if waited >= _WORTH_SAYING else ""
    return (
        f"loss {m['loss']:.4f}{_by_source(m, 'loss/')}  grad norm {m['grad_norm']:.3f}  lr {m['lr']:.2e}  "
        f"{_speed(m)}  {_memory(m)}  busiest expert {m['expert_imbalance']:.2f}x{dropped}{data}"
    )


def speed_line(speed: dict[str, Any], memory: dict[str, float]) -> str:
    """A line that says how fast a run was, from `Speed.result` and `throughput.memory`."""
    waits = f"waited {speed['data_wait_share']:.1%} for data, {speed['host_wait_share']:.0%} for the step's end"
    warmup = f"{speed['tokens_per_second_with_warmup']:,.0f} tokens/s with the first steps"
    return f"speed: {_speed(speed)} ({warmup}); {waits}; {_memory(memory)}"


def _speed(m: dict[str, Any]) -> str:
    peak = f" ({m['share_of_peak']:.0%} of peak)" if m.get("share_of_peak") is not None else ""
    return f"{m['tokens_per_second']:,.0f} tokens/s  {m['tflops_per_process']:.3g} TFLOP/s{peak}"


def _memory(m: dict[str, float]) -> str:
    card = f" ({m['memory_card_gb']:.2f} of the card)" if "memory_card_gb" in m else ""
    return f"{m['memory_gb']:.2f} GB{card}"
