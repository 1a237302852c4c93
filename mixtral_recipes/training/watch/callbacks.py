"""Callbacks under NeMo's names: small objects with the hooks they need.

A callback may define any of ``check(topology)`` (before a job is queued: refuse a layout with a RecipeError),
``configure(settings)`` (before the model is built: change Megatron's configs),
``on_train_start(run)``, ``on_step_start(run, step)``, ``on_step_end(run, metrics)``,
``on_validation_end(run, metrics)`` and ``on_train_end(run)``. The loop calls those that exist, in the order of
``trainer.callbacks``; ``on_train_end`` also when training stops early. Profilers are in `profiling.py`.
"""

import gc
import time
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.training.guards import signals


def call(callbacks: list[Any] | None, hook: str, *args: Any) -> None:
    """Call one hook of every callback that has it."""
    for callback in callbacks or []:
        method = getattr(callback, hook, None)
        if method is not None:
            method(*args)


@takes_nemos_arguments
@dataclass
class TimingCallback:
    """Reports the wall time of each step as ``step_seconds``.

    Attributes:
        log_tokens_per_sec: Accepted for NeMo's recipes; tokens per second are always reported.
        timer_kwargs: Accepted for NeMo's recipes.
    """

    log_tokens_per_sec: bool = False
    timer_kwargs: dict[str, Any] = field(default_factory=dict)

    def on_train_start(self, run: Any) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """Add the step's wall time to its metrics."""
        now = time.monotonic()
        metrics["step_seconds"] = now - self._last
        self._last = now


@takes_nemos_arguments
@dataclass
class GarbageCollectionCallback:
    """Collects garbage at the same step on every rank, so that no rank pauses while the others wait.

    Attributes:
        gc_interval_train: Steps between collections.
        gc_interval_val: Validations between collections.
    """

    gc_interval_train: int = 100
    gc_interval_val: int = 100

    def on_train_start(self, run: Any) -> None:
        """Switch automatic collection off."""
        gc.disable()
        self._validations = 0

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """Collect when it is time."""
        if self.gc_interval_train and metrics["step"] % self.gc_interval_train == 0:
            gc.collect()

    def on_validation_end(self, run: Any, metrics: dict[str, Any]) -> None:
        """Collect when it is time."""
        self._validations += 1
        if self.gc_interval_val and self._validations % self.gc_interval_val == 0:
            gc.collect()

    def on_train_end(self, run: Any) -> None:
        """Switch automatic collection back on."""
        gc.enable()


@takes_nemos_arguments
@dataclass
class MegatronTokenDropCallback:
    """Gives every expert a fixed capacity and drops the tokens beyond it.

    Attributes:
        moe_expert_capacity_factor: Capacity as a multiple of an even share.
        moe_pad_expert_input_to_capacity: Whether experts with fewer tokens are padded to it.
    """

    moe_expert_capacity_factor: float = 1.0  # NeMo's performance mode
    moe_pad_expert_input_to_capacity: bool = True

    def configure(self, settings: dict[str, dict[str, Any]]) -> None:
        """Set the router's fields."""
        settings["model"] |= {
            "moe_expert_capacity_factor": self.moe_expert_capacity_factor,
            "moe_pad_expert_input_to_capacity": self.moe_pad_expert_input_to_capacity,
        }


@takes_nemos_arguments
@dataclass
class MegatronCommOverlapCallback:
    """Hides communication behind computation where the hardware can.

    Attributes:
        tp_comm_overlap: Tensor-parallel overlap through Transformer Engine's user buffers (`training/user_buffers.py`);
            None leaves it as ``model.config`` has it, which is off.
        overlap_p2p_comm: Overlap of pipeline sends and receives; None: with interleaving.
        batch_p2p_comm: Batched pipeline sends and receives; None: without overlap.
        overlap_grad_reduce: Overlap of gradient reduction with the backward pass; None: with data parallelism.
        overlap_param_gather: Overlap of parameter gathering with the forward pass; None: with data parallelism.
        overlap_param_gather_with_optimizer_step: Also with the optimizer step; needs interleaving.
        align_param_gather: Whether pipeline stages gather together.
        bucket_size: Parameters per gradient bucket; None takes Megatron's.
        defer_embedding_wgrad_compute: Whether the output layer's weight gradient waits for the pipeline flush, on
            GPUs and with pipeline stages.
        wgrad_deferral_limit: How many microbatches it may wait.
    """

    tp_comm_overlap: bool | None = None
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    overlap_param_gather_with_optimizer_step: bool | None = None
    align_param_gather: bool | None = None
    bucket_size: int | None = None
    defer_embedding_wgrad_compute: bool | None = None
    wgrad_deferral_limit: int | None = None

    def check(self, topology: Topology) -> None:
        """Refuse settings this layout cannot run.

        Raises:
            RecipeError: names the setting.
        """
        stages, chunks = topology.pipeline_model_parallel_size, topology.virtual_pipeline_model_parallel_size
        if stages == 2 and chunks and (self.overlap_p2p_comm is False or self.batch_p2p_comm):
            setting = "batch_p2p_comm=True" if self.batch_p2p_comm else "overlap_p2p_comm=False"
            raise RecipeError(
                f"MegatronCommOverlapCallback.{setting} with pipeline_model_parallel_size=2 and "
                f"virtual_pipeline_model_parallel_size={chunks}: with two stages, both neighbours are the same rank, "
                "and batched messages would cross; leave it at null."
            )

    def configure(self, settings: dict[str, dict[str, Any]]) -> None:
        """Set the overlap fields of the model, DDP and optimizer configs."""
        topology = settings["run"]["topology"]
        self.check(topology)
        interleaved = bool(topology.virtual_pipeline_model_parallel_size)
        on_gpu = settings["run"]["device"].type == "cuda"
        data_parallel = topology.data_parallel_size > 1
        model: dict[str, Any] = {}
        if topology.pipeline_model_parallel_size > 1:
            overlap_p2p = interleaved if self.overlap_p2p_comm is None else self.overlap_p2p_comm
            model["overlap_p2p_comm"] = overlap_p2p
            model["batch_p2p_comm"] = not overlap_p2p if self.batch_p2p_comm is None else self.batch_p2p_comm
            model["defer_embedding_wgrad_compute"] = bool(self.defer_embedding_wgrad_compute) and on_gpu
        if self.tp_comm_overlap is not None:
            model["tp_comm_overlap"] = self.tp_comm_overlap and on_gpu
        if self.wgrad_deferral_limit is not None:
            model["wgrad_deferral_limit"] = self.wgrad_deferral_limit
        settings["model"] |= model
        for name in ("overlap_grad_reduce", "overlap_param_gather"):
            value = getattr(self, name)
            settings["ddp"][name] = data_parallel if value is None else value
        for name in ("align_param_gather", "bucket_size"):
            if getattr(self, name) is not None:
                settings["ddp"][name] = getattr(self, name)
        with_step = bool(self.overlap_param_gather_with_optimizer_step) and interleaved
        settings["optimizer"]["overlap_param_gather_with_optimizer_step"] = with_step


@takes_nemos_arguments
@dataclass
class PreemptionCallback:
    """Makes the run save and stop when a signal arrives. The loop always watches SIGTERM, SIGUSR1 and Ctrl-C.

    Attributes:
        sig: Signal to watch besides those, by name (``"SIGUSR2"``) or number; None adds none.
    """

    sig: str | int | None = None

    def check(self, topology: Topology) -> None:
        """Refuse what is not a signal.

        Raises:
            RecipeError: names it.
        """
        if self.sig:
            signals.name_of(self.sig)
