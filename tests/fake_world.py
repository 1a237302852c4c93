"""A process group whose other ranks do not exist."""

import contextlib
from collections.abc import Iterator

import torch

from mixtral_recipes.layout.topology import Topology


@contextlib.contextmanager
def one_of(topology: Topology, rank: int) -> Iterator[None]:
    """Be one rank of a job whose other ranks do not exist."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=topology.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            **topology.megatron_sizes(),
            create_gloo_process_groups=False,  # they would look for the other ranks
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
