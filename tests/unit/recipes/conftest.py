"""One rank of a large job on this machine: a fake process group, the meta device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.fake_world import one_of

BuildRank = Callable[[Any, int], list[Any]]


@pytest.fixture(scope="module")
def build_rank() -> Iterator[BuildRank]:
    """A function (recipe, rank) -> that rank's model chunks on the meta device, with its adapters."""
    import fiddle as fdl
    from megatron.core.transformer import transformer_config

    from mixtral_recipes.cpu import device as cpu_device
    from mixtral_recipes.layout.topology import Topology
    from mixtral_recipes.models.builder import build_model
    from mixtral_recipes.models.config import with_topology
    from mixtral_recipes.peft import attach
    from mixtral_recipes.training.precision import model_fields

    def build(recipe: Any, rank: int) -> list[Any]:
        topology = Topology.of(recipe.trainer)
        plugins: Any = fdl.build(recipe.trainer.plugins)
        # Meta tensors have nothing to initialise; Megatron would draw the numbers on the CPU.
        fields = model_fields(plugins) | {"perform_initialization": False}
        config = with_topology(fdl.build(recipe.model.config), topology, **fields)
        with one_of(topology, rank), torch.device("meta"):
            chunks = build_model(config, transformer_engine=False)
            if getattr(recipe, "peft", None) is not None:
                peft: Any = fdl.build(recipe.peft)
                attach.apply(peft, chunks)
            return chunks

    cpu_device.activate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))  # Megatron's linears ask for it
        # FP8 configurations ask for Transformer Engine's version; the layers here are PyTorch's.
        patch.setattr(transformer_config, "is_te_min_version", lambda *args, **kwargs: True)
        yield build
    cpu_device.deactivate()
