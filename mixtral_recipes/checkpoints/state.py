"""The state of a run that is not a tensor of the whole model: random generators, and how many steps Adam has made."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mixtral_recipes.checkpoints.shards import parts_of


def allocate_state(optimizer: Any) -> None:
    """Make the moments that a fused Adam makes at its first step, so that they can be read or written before it."""
    for part in parts_of(optimizer):
        if part.optimizer.state or not part.init_state_fn:
            continue
        if part.config.use_precision_aware_optimizer:  # Megatron's leaves out Transformer Engine's second argument
            adam = part.optimizer
            for parameter in (each for group in adam.param_groups for each in group["params"]):
                halves = adam.store_param_remainders and parameter.dtype == torch.bfloat16
                adam.initialize_state(parameter, halves)
        else:
            part.init_state_fn(part.optimizer, part.config)


def set_steps(optimizer: Any, step: int) -> None:
    """Tell Adam how many steps it has made: torch's counts per parameter, Transformer Engine's per group."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            states = {parameter: part.optimizer.state[parameter] for parameter in group["params"]}
            if any("step" in state for state in states.values()):
                for parameter, state in states.items():  # a fused Adam reads it on the parameter's device
                    state["step"] = torch.tensor(float(step), device=parameter.device)
            elif step:
                group["step"] = step


def random_key(rank: int, size: int) -> str:
    """The name of a rank's random state in a checkpoint."""
    return f"rng_state/shard_{rank}_{size}"


def random_state() -> dict[str, Any]:
    """This rank's random state, of plain values and tensors only: it is read back with ``weights_only=True``."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": _tracker().get_states(),
    }


def set_random_state(states: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    _tracker().set_states(states["megatron"])


def _tracker() -> Any:
    """Megatron's random states by name; there from the moment the groups are."""
    return get_cuda_rng_tracker()
