"""How fast a run is, in the unit papers use: floating-point operations the model needs, per second and process.

Shape suffixes as everywhere: h hidden, s sequence.
"""

import os

import torch

from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.models.config import MixtralConfig

# Dense peak of one GPU in 1e12 operations per second, bf16. Source: NVIDIA's datasheets (SXM).
_PEAK_BF16 = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "GB200": 2500.0}


def flops_per_token(config: MixtralConfig, sequence_length: float, *, adapters_only: bool = False) -> float:
    """Operations one token costs in a training step.

    A multiplication and an addition count as two; attention is causal, so a token meets half of its sequence. The
    backward pass costs twice the forward pass, or once where weights are frozen (only activations' gradients).
    Recomputation and adapters are not counted.

    Args:
        config: The model.
        sequence_length: Mean tokens per sequence.
        adapters_only: Whether the weights are frozen.
    """
    shape = ModelShape.of(config)
    h = shape.hidden_size
    queries = shape.head_dim * shape.num_attention_heads
    keys = shape.head_dim * shape.num_query_groups
    projections = 2 * h * (queries + 2 * keys) + 2 * queries * h
    attention = 2 * 2 * queries * sequence_length / 2
    experts = config.moe_router_topk * 3 * 2 * h * shape.ffn_hidden_size + 2 * h * shape.num_moe_experts
    forward = shape.num_layers * (projections + attention + experts) + 2 * h * shape.vocab_size
    return forward * (2 if adapters_only else 3)


def peak_tflops(device: torch.device, *, fp8: bool) -> float | None:
    """The peak of a device in 1e12 operations per second, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model in sorted(_PEAK_BF16, key=len, reverse=True):
        if model in name:
            return _PEAK_BF16[model] * (2 if fp8 else 1)
    return None


def memory_gb(device: torch.device) -> float:
    """Memory this process takes, in 1e9 bytes: the GPU's peak since the start, or what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
