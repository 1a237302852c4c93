"""A process group whose other ranks do not exist."""

import contextlib
from collections.abc import Iterator

import torch

from mixtral_recipes.topology import Topology


@contextlib.contextmanager
def one_of(topology: Topology, rank: int) -> Iterator[None]:
    """Be one rank of a job whose other ranks do not exist."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=topology.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor_model_parallel_size,
            pipeline_model_parallel_size=topology.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=topology.virtual_pipeline_model_parallel_size,
            context_parallel_size=topology.context_parallel_size,
            expert_model_parallel_size=topology.expert_model_parallel_size,
            expert_tensor_parallel_size=topology.expert_tp,
            create_gloo_process_groups=False,  # they would look for the other ranks
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
