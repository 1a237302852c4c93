"""The one place for adapters' names: after the layer they adapt, layers and experts counted over all ranks.

A tensor's key in a checkpoint is ``decoder.layers.3.mlp.experts.5.linear_fc1.adapter.lora_a``. What is adapted has its
name in the mapping's column ``adapted`` (`importers/mapping.py`).
"""

import re
from typing import Any

TENSORS = ("lora_a", "lora_b", "magnitude")


def global_name(chunk: Any, name: str, local_expert: int | None = None) -> str:
    """A layer's name with its layer and expert numbers counted over all ranks, as checkpoints name it.

    Args:
        chunk: The model chunk it is in.
        name: Its name there.
        local_expert: Which of a grouped layer's experts.
    """
    from megatron.core import parallel_state  # here: export reads names without Megatron

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


def tensor_key(layer: str, tensor: str) -> str:
    """An adapter's tensor in a checkpoint.

    Args:
        layer: The adapted layer's name.
        tensor: One of `TENSORS`.
    """
    return f"{layer}.adapter.{tensor}"


def is_adapters(name: str) -> bool:
    """Whether a parameter, or a tensor of a checkpoint, is an adapter's own (and not what an optimizer keeps of it)."""
    return ".adapter." in name and not name.startswith("optimizer.")
