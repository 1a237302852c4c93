"""nemo_run's own torchrun on this machine, under NeMo's name: ``llm.torchrun``, and ``run.executor=torchrun``."""

import nemo_run as run

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system import machine


@run.cli.factory
def torchrun(devices: int | None = None) -> run.Config[run.LocalExecutor]:
    """An executor that starts a process per device with torchrun.

    Args:
        devices: How many; None takes every GPU.

    Raises:
        LaunchError: None, and there are no GPUs.
    """
    devices = machine.gpu_count() if devices is None else devices
    if not devices:
        raise LaunchError("torchrun: no GPUs to start processes for; give their number, e.g. torchrun(devices=2).")
    # NeMo's setting: collectives free their buffers as soon as they have ended
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=devices,
        launcher="torchrun",
        env_vars={"TORCH_NCCL_AVOID_RECORD_STREAMS": "1"},
    )
