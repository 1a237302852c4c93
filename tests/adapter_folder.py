"""Adapter checkpoints of random factors on an imported model, without a run."""

from pathlib import Path

import torch

from mixtral_recipes.importers.convert.adapter_checkpoint import write_adapter_checkpoint
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS, instances, shape_of
from mixtral_recipes.peft.names import tensor_key
from mixtral_recipes.peft.whole import WEIGHTS as WHOLE
from mixtral_recipes.settings.peft import DoRA, LoRA


def make_adapter(
    base: Path, scheme: LoRA, output: Path, *, size: float = 0.1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write an adapter checkpoint.

    Args:
        base: The checkpoint it adapts.
        scheme: What is adapted.
        output: The folder to make.
        size: Standard deviation of A and B.
        seed: Of their values.
        dtype: Of the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = hf_config.dims(read_config(base / "context"))
    tensors = {}
    for weight in WEIGHTS:
        for layer, expert in instances(weight, dims) if weight.adapted else ():
            name = str(weight.adapted).format(layer=layer, expert=expert)
            kind = name.rsplit(".", 1)[-1]
            if not scheme.adapts(name):
                continue
            shapes = [shape_of(shape, dims) for shape in weight.shapes]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
            halves = (2, rows // 2) if kind == "linear_fc1" else (rows,)
            factors = {"lora_a": (scheme.dim_of(name), columns), "lora_b": (*halves, scheme.dim_of(name))}
            for factor, shape in factors.items():
                tensors[tensor_key(name, factor)] = (size * torch.randn(shape, generator=generator)).to(dtype)
            if isinstance(scheme, DoRA):
                tensors[tensor_key(name, "magnitude")] = (torch.rand(halves, generator=generator) + 0.5).to(dtype)
    for weight in WEIGHTS:
        if weight.disk in {WHOLE[module] for module in scheme.modules_to_save}:
            shape = shape_of(weight.shapes[0], dims)
            tensors[weight.disk] = (size * torch.randn(shape, generator=generator)).to(dtype)
    return write_adapter_checkpoint(output, scheme, tensors, base=base, sources=[], origin={"layout": "test"})
