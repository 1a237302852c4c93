"""Callbacks that look inside some steps: nsys, torch's profiler, memory. Under NeMo's names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.system.ranks import rank_and_size


def _check_range(name: str, start_step: int, end_step: int) -> None:
    if not 1 <= start_step <= end_step:
        raise RecipeError(
            f"{name}: start_step={start_step} and end_step={end_step} are not a valid range; steps count from 1."
        )


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


@takes_nemos_arguments
@dataclass
class NsysCallback:
    """Lets ``nsys profile --capture-range=cudaProfilerApi`` record a range of steps, each in an NVTX range.

    Does nothing without a GPU.

    Attributes:
        start_step: First step recorded.
        end_step: Last step recorded.
        ranks: Which ranks record.
        gen_shape: Whether tensor shapes are recorded.
    """

    start_step: int
    end_step: int
    ranks: list[int] = field(default_factory=lambda: [0])
    gen_shape: bool = False

    def on_train_start(self, run: Any) -> None:
        """Find out whether this rank records."""
        _check_range("NsysCallback", self.start_step, self.end_step)
        self._records = run.device.type == "cuda" and rank_and_size()[0] in self.ranks
        self._nvtx: Any = None

    def on_step_start(self, run: Any, step: int) -> None:
        """Begin to record, and open the step's range."""
        if not self._records or not self.start_step <= step <= self.end_step:
            return
        if step == self.start_step:
            _cuda_runtime().cudaProfilerStart()
            self._nvtx = torch.autograd.profiler.emit_nvtx(record_shapes=self.gen_shape)
            self._nvtx.__enter__()
        torch.cuda.nvtx.range_push(f"step {step}")

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """Close the step's range, and end the recording after the last."""
        if not self._records or not self.start_step <= metrics["step"] <= self.end_step:
            return
        torch.cuda.nvtx.range_pop()
        if metrics["step"] == self.end_step:
            self.on_train_end(run)

    def on_train_end(self, run: Any) -> None:
        """End the recording."""
        if self._nvtx is not None:
            self._nvtx.__exit__(None, None, None)
            _cuda_runtime().cudaProfilerStop()
            self._nvtx = None


@takes_nemos_arguments
@dataclass
class PytorchProfilerCallback:
    """Writes torch's profile of a range of steps, one trace per rank, for chrome://tracing or Perfetto.

    Attributes:
        start_step: First step recorded.
        end_step: Last step recorded.
        trace_dir: Folder of ``rank-N.json``.
        ranks: Which ranks record.
        record_shapes: Whether tensor shapes are recorded.
        with_stack: Whether Python stacks are recorded.
        profile_memory: Whether allocations are recorded.
    """

    start_step: int
    end_step: int
    trace_dir: str = "torch_profile"
    ranks: list[int] = field(default_factory=lambda: [0])
    record_shapes: bool = False
    with_stack: bool = False
    profile_memory: bool = False

    def on_train_start(self, run: Any) -> None:
        """Check the range."""
        _check_range("PytorchProfilerCallback", self.start_step, self.end_step)
        self._profiler: Any = None

    def on_step_start(self, run: Any, step: int) -> None:
        """Begin to record."""
        if step == self.start_step and rank_and_size()[0] in self.ranks:
            self._profiler = torch.profiler.profile(
                record_shapes=self.record_shapes, with_stack=self.with_stack, profile_memory=self.profile_memory
            )
            self._profiler.start()

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """End the recording after the last step."""
        if metrics["step"] == self.end_step:
            self.on_train_end(run)

    def on_train_end(self, run: Any) -> None:
        """Write what was recorded."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(self.trace_dir)
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank_and_size()[0]}.json"))


@takes_nemos_arguments
@dataclass
class MemoryProfileCallback:
    """Writes a snapshot of GPU memory, with the stack of each allocation, for https://pytorch.org/memory_viz.

    Without a GPU it writes the largest Python allocations instead (``tracemalloc``).

    Attributes:
        dir: Folder of ``rank-N.pickle`` (GPU) or ``rank-N.txt``.
        ranks: Which ranks write; empty means all.
        steps: After how many steps the snapshot is taken.
    """

    dir: str = "memory_profile"
    ranks: list[int] = field(default_factory=list)
    steps: int = 3

    def on_train_start(self, run: Any) -> None:
        """Begin to record allocations."""
        self._left = self.steps
        self._records = not self.ranks or rank_and_size()[0] in self.ranks
        if self._records and run.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        elif self._records:
            import tracemalloc

            tracemalloc.start(8)

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """Write the snapshot when it is time."""
        self._left -= 1
        if self._left == 0:
            self.on_train_end(run)

    def on_train_end(self, run: Any) -> None:
        """Write the snapshot, once."""
        if not self._records:
            return
        self._records = False
        folder = Path(self.dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{rank_and_size()[0]}"
        if run.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            return
        import tracemalloc

        largest = tracemalloc.take_snapshot().statistics("lineno")[:100]
        (folder / f"{name}.txt").write_text("\n".join(map(str, largest)) + "\n")
        tracemalloc.stop()
