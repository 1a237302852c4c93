"""NeMo's plugins for nemo_run's experiments: ``experiment.add(recipe, executor=..., plugins=[NsysPlugin(...)])``.

Each changes the recipe and the executor before the job starts.
"""

import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run

from mixtral_recipes.errors import EnvironmentProblem, LaunchError
from mixtral_recipes.executors.nemo_run_jobs import ranks_of_ours
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.training.watch.callbacks import PreemptionCallback
from mixtral_recipes.training.watch.profiling import MemoryProfileCallback, NsysCallback

_WANDB_KEY = "WANDB_API_KEY"


def _add_callback(task: Any, callback: run.Config[Any]) -> None:
    trainer = getattr(task, "trainer", None)  # a run.Script has none
    if trainer is not None and callback not in (trainer.callbacks or []):
        trainer.callbacks = [*(trainer.callbacks or []), callback]


@takes_nemos_arguments
@dataclass(kw_only=True)
class PreemptionPlugin(run.Plugin):
    """Have Slurm send a signal before a job's time limit, and have the run save and stop when it arrives.

    Attributes:
        preempt_time: Seconds before the limit.
        sig: The signal.
        callbacks: Callbacks to add; None adds `PreemptionCallback` for the signal.
    """

    preempt_time: int = 60
    sig: signal.Signals = signal.SIGTERM
    callbacks: list[run.Config[Any]] | None = None

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it."""
        if isinstance(executor, run.SlurmExecutor):
            executor.signal = f"{self.sig.value}@{self.preempt_time}"
        for callback in self.callbacks or [run.Config(PreemptionCallback, sig=self.sig.name)]:
            _add_callback(task, callback)


@takes_nemos_arguments
@dataclass(kw_only=True)
class NsysPlugin(run.Plugin):
    """Record a range of steps with nsys.

    Attributes:
        start_step: First step recorded.
        end_step: Last step recorded.
        ranks: Which ranks record; None means rank 0.
        nsys_trace: What nsys traces; None means nvtx and cuda.
        gen_shape: Whether tensor shapes are recorded.
    """

    start_step: int
    end_step: int
    ranks: list[int] | None = None
    nsys_trace: list[str] | None = None
    gen_shape: bool = False

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it."""
        _add_callback(
            task,
            run.Config(
                NsysCallback,
                start_step=self.start_step,
                end_step=self.end_step,
                ranks=self.ranks or [0],
                gen_shape=self.gen_shape,
            ),
        )
        launcher = executor.get_launcher()
        launcher.nsys_profile = True
        launcher.nsys_trace = self.nsys_trace or ["nvtx", "cuda"]
        if isinstance(executor, run.SlurmExecutor):  # Slurm fills in %q{...}
            launcher.nsys_filename = "profile_%p_%q{SLURM_JOB_ID}_node%q{SLURM_NODEID}_rank%q{SLURM_PROCID}"


@takes_nemos_arguments
@dataclass(kw_only=True)
class MemoryProfilePlugin(run.Plugin):
    """Write a snapshot of GPU memory.

    Attributes:
        dir: Folder of the snapshots.
        ranks: Which ranks write; None means rank 0.
    """

    dir: str
    ranks: list[int] | None = None

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it."""
        _add_callback(task, run.Config(MemoryProfileCallback, dir=self.dir, ranks=self.ranks or [0]))


@takes_nemos_arguments
@dataclass(kw_only=True)
class WandbPlugin(run.Plugin):
    """Log to Weights & Biases, and give the job the key it needs.

    Attributes:
        name: Run name.
        logger_fn: Makes the logger's config, e.g. ``recipes.log.default.wandb_logger`` with a project.
    """

    name: str
    logger_fn: Callable[..., run.Config[Any]]

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it.

        Raises:
            EnvironmentProblem: WANDB_API_KEY is not set.
        """
        if _WANDB_KEY not in os.environ:
            raise EnvironmentProblem(f"WandbPlugin: {_WANDB_KEY} is not set in the environment.")
        if ranks_of_ours(executor) is None:
            executor.env_vars[_WANDB_KEY] = os.environ[_WANDB_KEY]
        else:  # whose jobs get it in a file for their owner
            cluster = executor.job_details.cluster  # pyright: ignore[reportAttributeAccessIssue]
            cluster["secrets"] = sorted({*cluster["secrets"], _WANDB_KEY})
        if getattr(task, "log", None) is not None:
            task.log.wandb = self.logger_fn(name=self.name)


@takes_nemos_arguments
@dataclass(kw_only=True)
class ConfigValidationPlugin(run.Plugin):
    """Refuse a recipe that does not fit its executor.

    Attributes:
        validate_checkpoint_dir: On Slurm in a container: whether the folder of runs must be mounted.
        validate_serialization: Whether the recipe must be unchanged after it is stored and loaded.
        validate_wandb: Whether Weights & Biases and its key must be set.
        validate_nodes_and_devices: On Slurm: whether recipe and executor must agree on nodes and processes.
    """

    validate_checkpoint_dir: bool = True
    validate_serialization: bool = True
    validate_wandb: bool = False
    validate_nodes_and_devices: bool = True

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it.

        Raises:
            LaunchError: names what does not fit.
        """
        if self.validate_serialization:
            from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

            serializer = ZlibJSONSerializer()
            if serializer.deserialize(serializer.serialize(task)) != task:
                raise LaunchError(
                    "the recipe changes when it is stored and loaded again; build it with run.Config(...)."
                )
        passed = executor.env_vars if ranks_of_ours(executor) is None else os.environ
        if self.validate_wandb and not (task.log.wandb and _WANDB_KEY in passed):
            raise LaunchError(f"log.wandb or the executor's {_WANDB_KEY} is not set; add a WandbPlugin.")
        if isinstance(executor, run.SlurmExecutor):
            self._check_slurm(task, executor)

    def _check_slurm(self, task: Any, executor: run.SlurmExecutor) -> None:
        if self.validate_nodes_and_devices:
            per_node = ranks_of_ours(executor) or executor.nproc_per_node()
            asked, got = (task.trainer.num_nodes, task.trainer.devices), (executor.nodes, per_node)
            if asked != got:
                raise LaunchError(
                    f"trainer.num_nodes x trainer.devices is {asked[0]} x {asked[1]}, but the executor's nodes x "
                    f"ntasks_per_node is {got[0]} x {got[1]}; make them equal."
                )
        if self.validate_checkpoint_dir and executor.container_image and ranks_of_ours(executor) is None:
            inside = [mount.split(":")[-1] for mount in [*executor.container_mounts, "/nemo_run"]]
            folder = Path(task.log.log_dir or "")
            if not any(folder.is_relative_to(mount) for mount in inside):
                raise LaunchError(
                    f"log.log_dir={task.log.log_dir!r} is not inside any of the container's mounts: {inside}."
                )


@takes_nemos_arguments
@dataclass(kw_only=True)
class PerfEnvPlugin(run.Plugin):
    """Set the environment variables NeMo's benchmarks use.

    Attributes:
        enable_layernorm_sm_margin: Whether layer norms leave some SMs to communication.
        layernorm_sm_margin: How many.
        enable_vboost: On Slurm: whether power is steered to the tensor cores (``nvidia-smi boost-slider``, with sudo).
        nccl_pp_comm_chunksize: Chunk size of sends between pipeline stages; None uses NCCL's.
        gpu_sm100_or_newer: Whether the GPUs are Blackwell or newer.
        user_buffer_registration: Whether NCCL may use registered buffers (NVLS).
    """

    enable_layernorm_sm_margin: bool = True
    layernorm_sm_margin: int = 16
    enable_vboost: bool = False
    nccl_pp_comm_chunksize: int | None = None
    gpu_sm100_or_newer: bool = False
    user_buffer_registration: bool = False

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it."""
        env, strategy = executor.env_vars, task.trainer.strategy
        if strategy.tensor_model_parallel_size > 1 or strategy.context_parallel_size > 1:
            # kernels start in the program's order, so that communication can overlap
            env["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if self.gpu_sm100_or_newer else "1"
        if self.enable_layernorm_sm_margin:
            for way in ("FWD", "BWD"):
                env[f"NVTE_{way}_LAYERNORM_SM_MARGIN"] = str(self.layernorm_sm_margin)
        if strategy.pipeline_model_parallel_size > 1 and self.nccl_pp_comm_chunksize is not None:
            env["NCCL_P2P_NET_CHUNKSIZE"] = str(self.nccl_pp_comm_chunksize)
        env["TORCH_NCCL_HIGH_PRIORITY"] = "1"
        if self.user_buffer_registration:
            env |= {"NCCL_NVLS_ENABLE": "1", "NCCL_CTA_POLICY": "1"}
        if self.enable_vboost and isinstance(executor, run.SlurmExecutor):
            boost = shlex.quote("sudo nvidia-smi boost-slider --vboost 1")
            executor.setup_lines = f"{executor.setup_lines or ''}\nsrun --ntasks={executor.nodes} bash -c {boost}\n"


@takes_nemos_arguments
@dataclass(kw_only=True)
class FaultTolerancePlugin(run.Plugin):
    """Start a failed job again, and end a rank that makes no progress.

    Attributes:
        num_job_retries_on_failure: How often a job is started again.
        rank_heartbeat_timeout: Seconds a rank may make no progress; becomes ``trainer.hang_timeout_seconds``, which
            must exceed the longest step, validation or save.
    """

    num_job_retries_on_failure: int = 2
    rank_heartbeat_timeout: int = 300

    def setup(self, task: Any, executor: run.Executor) -> None:
        """As nemo_run calls it."""
        executor.retries = self.num_job_retries_on_failure
        if getattr(task, "trainer", None) is not None:
            task.trainer.hang_timeout_seconds = float(self.rank_heartbeat_timeout)
