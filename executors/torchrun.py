"""nemo_run's own torchrun on this machine, under NeMo's name: ``llm.torchrun``, and ``run.executor=torchrun``."""

import nemo_run as run

from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.system import machine


@run.cli.factory
@returns_config
def torchrun(devices: int | None = None) -> run.Config[run.LocalExecutor]:
    """An executor that starts a process per device with torchrun.

    Args:
        devices: How many; None uses every GPU, or one process where there are none.
    """
    # NeMo's setting: collectives free their buffers as soon as they have ended
    return run.Config(
        run.LocalExecutor,
        ntasks_per_node=devices or machine.gpu_count() or 1,
        launcher="torchrun",
        env_vars={"TORCH_NCCL_AVOID_RECORD_STREAMS": "1"},
    )
