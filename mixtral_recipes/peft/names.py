"""The one place for adapters' names: after the layer they adapt, layers and experts counted over all ranks."""

import re
from typing import Any

from megatron.core import parallel_state


def global_name(chunk: Any, name: str, local_expert: int | None = None) -> str:
    """A layer's name with its layer and expert numbers counted over all ranks, as checkpoints name it.

    Args:
        chunk: The model chunk it is in.
        name: Its name there.
        local_expert: Which of a grouped layer's experts.
    """
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    assert found, name
    layer = chunk.decoder.layers[int(found[1])].layer_number - 1
    rest = found[2]
    expert = re.match(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(.*)", rest)
    if expert:
        here = int(expert[1]) if local_expert is None else local_expert
        experts = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        number = parallel_state.get_expert_model_parallel_rank() * experts + here
        rest = f"mlp.experts.{number}.{expert[2]}"
    return f"decoder.layers.{layer}.{rest}"
