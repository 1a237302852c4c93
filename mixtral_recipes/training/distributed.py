"""Process groups: torch.distributed, Megatron's parallel state and the seeds, for a GPU cluster or a laptop."""

import gc
import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.errors import EnvironmentProblem, RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models import kernel_choice
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.system import machine, ranks

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # after which a collective that does not finish fails


@dataclass(frozen=True)
class ProcessPlace:
    """This process's place among those of the run.

    Attributes:
        rank: Global rank.
        local_rank: Rank on this node.
        world_size: Processes in all.
    """

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "ProcessPlace":
        """As torchrun or the process group that was joined say; one process alone without either."""
        return cls(ranks.launched_rank(), ranks.launched_local_rank(), ranks.launched_size())


def check_accelerator(accelerator: str) -> None:
    """Check that this machine has what ``trainer.accelerator`` asks for.

    Raises:
        EnvironmentProblem: ``"gpu"`` was asked for and there is none, or torch cannot use the GPUs that are there.
        RecipeError: it is not ``"gpu"``, ``"cpu"`` or ``"auto"``.
    """
    if accelerator not in ("gpu", "cpu", "auto"):
        raise RecipeError(f"trainer.accelerator={accelerator!r} is not supported; use 'gpu', 'cpu' or 'auto'.")
    if accelerator != "cpu":
        _refuse_gpus_torch_cannot_use()
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "trainer.accelerator='gpu', but this machine has no usable CUDA device; run on a GPU node "
            "(--executor slurm), or use --recipe mixtral_tiny, which trains on a CPU."
        )


def choose_device(accelerator: str, place: ProcessPlace) -> torch.device:
    """Take this process's GPU, or put the CPU stand-ins in place.

    Args:
        accelerator: ``"gpu"``, ``"cpu"`` or ``"auto"``.
        place: This process.

    Raises:
        EnvironmentProblem: as `check_accelerator`, or ``"cpu"`` where there is a GPU.
        RecipeError: another word.
    """
    check_accelerator(accelerator)
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        if machine.no_compiler():  # the run says so (`models/kernels.py`), and is slower
            torch.compiler.set_stance("force_eager")
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            _let_segments_grow(device)
        return device
    cpu_device.activate()
    torch.set_num_threads(min(torch.get_num_threads(), machine.cores()))  # torch looks at no container's share
    return torch.device("cpu")


def _let_segments_grow(device: torch.device) -> None:
    """Keep memory whole: routing gives experts other sizes at every step, which fixed segments leave gaps between.

    A driver may not do it: virtual GPUs and sandboxes have those. Torch finds out when it allocates, so what this
    process has already (a notebook, a run before) is left as it is. So is the environment: another process asks anew.

    Source: NVIDIA's docs for Megatron Bridge name it as the first cure of fragmented memory.
    """
    if torch.cuda.memory_reserved(device):
        return
    settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    settings("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        settings("expandable_segments:False")


def _refuse_gpus_torch_cannot_use() -> None:
    """Refuse to train on the CPU of a machine whose GPUs torch cannot use.

    Raises:
        EnvironmentProblem: a driver too old for torch's CUDA, or a torch without CUDA.
    """
    count = machine.gpu_count()
    if not count or torch.cuda.is_available():
        return
    why = "torch.cuda.is_available() is False"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition(". ")[0].rstrip(".")
    raise EnvironmentProblem(
        f"this machine has {count} GPU(s) that torch {torch.__version__} cannot use: {why}. Install a torch built for "
        "the CUDA version that `nvidia-smi` shows, or a newer driver; set CUDA_VISIBLE_DEVICES= (empty) to train on "
        "the CPU."
    )


def join(trainer: Trainer) -> torch.device:
    """Take this process's device, and meet the run's other processes.

    Raises:
        EnvironmentProblem: as `choose_device`.
        RecipeError: as `choose_device` and `initialize`.
    """
    place, topology = ProcessPlace.from_environment(), trainer.topology()
    if trainer.accelerator != "cpu" and topology.tensor_model_parallel_size * topology.context_parallel_size > 1:
        # Read by the driver when it starts. Kernels begin in the order they were asked for, without which these two do
        # not overlap their communication (Megatron-Core's docs). It also lines up experts' products and the data ranks'
        # communication, which have streams of their own; so NeMo sets it for these two only.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = choose_device(trainer.accelerator, place)
    initialize(topology, place, device, seed=trainer.seed)
    return device


def initialize(topology: Topology, place: ProcessPlace, device: torch.device, *, seed: int) -> None:
    """Start torch.distributed and Megatron's groups, and seed everything.

    Args:
        topology: The layout; its world size must be this run's.
        place: This process.
        device: As `choose_device` returned it; NCCL on a GPU, gloo on a CPU.
        seed: Base seed; Megatron derives one per pipeline and tensor rank from it.

    Raises:
        RecipeError: the recipe needs another number of processes than were started.
    """
    if topology.world_size != place.world_size:
        raise RecipeError(
            f"trainer.num_nodes x trainer.devices = {topology.world_size}, but {place.world_size} process(es) were "
            "started; set --num-nodes and --num-gpus-per-node to what was started. If you started none, remove the "
            "launcher's variables from the environment: unset TORCHELASTIC_RUN_ID."
        )
    if not torch.distributed.is_initialized():
        ranks.meet("nccl" if device.type == "cuda" else "gloo", _COLLECTIVE_TIMEOUT)
    parallel_state.initialize_model_parallel(**topology.megatron_sizes())
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's per-axis generators (Megatron-LM offsets by pipeline rank)."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    """Leave every group. Safe to call when none was joined."""
    kernel_choice.forget()
    destroy_moe_metrics_tracker()  # keeps the groups of each loss, and as many places as there were layers
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_memory() -> None:
    """Give back what runs of this process held that have ended: on the device, and in Transformer Engine's lists."""
    RotaryEmbedding.forward.cache_clear()  # a cache of its instances, and of what is hooked to them
    gc.collect()  # models, optimizers and their hooks refer to each other
    if "transformer_engine.pytorch" in sys.modules:  # its FP8 state lists the amaxes of every layer ever made
        from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
            FP8GlobalStateManager,
        )

        FP8GlobalStateManager.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
