"""NeMo 2.0's adapter checkpoints into ours: LoRA and DoRA, every factor as it was trained.

NeMo saves a layer's factors stacked over the layers, and over the experts where each expert has its own. Under its
grouped experts one adapter serves all experts of a layer; it becomes one for each, which computes the same.

Source: NeMo `collections/llm/peft/utils.py` (ParallelLinearAdapter), `dora.py`, `lightning/pytorch/callbacks/peft.py`
(WrappedAdapterIO).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_checkpoint import adapter_parent, write_adapter_checkpoint
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, disk_shape, instances
from mixtral_recipes.importers.model_weights import PREFIX
from mixtral_recipes.importers.nemo.context import Context, read_context
from mixtral_recipes.importers.nemo.fiddle_json import CALL, TARGET
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.peft import names
from mixtral_recipes.settings.peft import ALL_LINEAR, DoRA, LoRA
from mixtral_recipes.system.json_files import read_object

METADATA = "adapter_metadata.json"
# Our tensor -> NeMo's.
TENSORS = {"lora_a": "linear_in.weight", "lora_b": "linear_out.weight", "magnitude": "weight_magnitude"}
# With NeMo's defaults, for what io.json leaves out.
_KINDS: dict[str, tuple[type[LoRA], dict[str, Any]]] = {
    "LoRA": (LoRA, {"dim": 32, "alpha": 32}),
    "DoRA": (DoRA, {"dim": 32, "alpha": 64}),
}


def base_named_by(folder: Path) -> Path:
    """The checkpoint that an adapter of NeMo's says it was trained on.

    Raises:
        CheckpointError: it says none, or nothing is there.
    """
    path = folder / "weights" / METADATA
    try:
        named = Path(read_object(path, CheckpointError)["model_ckpt_path"])
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: does not name the base model of the adapters; pass it with --base.") from error
    if not named.is_dir():
        raise CheckpointError(f"{path}: the base model {named} does not exist; pass its new location with --base.")
    return named


def write_nemo_adapter(folder: Path, base: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Convert a NeMo 2.0 adapter checkpoint into one of ours.

    Args:
        folder: NeMo's.
        base: The checkpoint of ours with the model it adapts.
        output: The checkpoint to make; must not exist.
        overwrite: Replace an existing checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: as `read_adapter`, or ``output`` is there already.
    """
    scheme, tensors = read_adapter(folder, base)
    return write_adapter_checkpoint(
        output,
        scheme,
        tensors,
        base=base,
        sources=[adapter_parent(folder, base)],
        origin={"layout": "nemo"},
        overwrite=overwrite,
    )


def read_adapter(folder: Path, base: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """A NeMo 2.0 adapter checkpoint as an adapter checkpoint of ours has it.

    Args:
        folder: NeMo's: ``weights/`` with the adapters only, and ``context/``.
        base: The checkpoint of ours with the model it adapts.

    Returns:
        The scheme, and every tensor by its key.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the base's, or the scheme is not known here.
    """
    context = read_context(folder)
    dims = hf_config.dims(read_config(base / "context"))
    stored = StoredWeights(folder / "weights")
    scheme = scheme_from(context, stored)
    return scheme, dict(_tensors(stored, scheme, dims))


def scheme_from(context: Context, stored: StoredWeights) -> LoRA:
    """The scheme an adapter was trained with, as NeMo's context says.

    Args:
        context: The checkpoint's.
        stored: Its weights; which layers are adapted follows from them.

    Raises:
        CheckpointError: none is named, or another kind than LoRA and DoRA.
    """
    given = context.model.get("model_transform")
    name = str(given.get(TARGET)).rpartition(".")[2] if isinstance(given, dict) else ""
    if not isinstance(given, dict) or given.get(CALL) is False or name not in _KINDS:
        what = given.get(TARGET) if isinstance(given, dict) else given
        raise CheckpointError(f"{context.file}: model.model_transform is {what}; only LoRA and DoRA can be imported.")
    kind, fields = _KINDS[name]
    fields = fields | {key: given[key] for key in ("dim", "alpha", "dropout", "dropout_position") if key in given}
    for key in ("dim", "alpha"):
        if not isinstance(fields[key], int | float) or isinstance(fields[key], bool) or not fields[key] > 0:
            raise CheckpointError(f"{context.file}: model.model_transform.{key}={fields[key]!r} must be positive.")
    found = [layer for layer in ALL_LINEAR if any(f".{layer}.adapter." in key for key in stored.tensors)]
    if not found:
        raise CheckpointError(f"{stored.folder}: holds no adapters (no name with .adapter. in it).")
    return kind(target_modules=found, **fields)


def _tensors(stored: StoredWeights, scheme: LoRA, dims: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ours in NeMo's checkpoint.

    Raises:
        CheckpointError: one is missing or of another shape, or the checkpoint holds a tensor that adapts nothing.
    """
    keys = {key for key in stored.tensors if ".adapter." in key and not key.startswith("optimizer.")}
    prefix = min(keys).partition("decoder.")[0]
    for weight in WEIGHTS:
        module = f"{prefix}{module_of(weight)}.adapter."
        wanted = [name for name in TENSORS if module + TENSORS[name] in keys]
        if not weight.adapted or not wanted:
            continue
        if {"lora_a", "lora_b"} - set(wanted) or isinstance(scheme, DoRA) != ("magnitude" in wanted):
            raise CheckpointError(
                f"{stored.folder}: {module}* does not have exactly the tensors of a {type(scheme).__name__} adapter."
            )
        for name in wanted:
            keys.discard(module + TENSORS[name])
            yield from _of_module(stored, weight, name, module + TENSORS[name], scheme, dims)
    if keys or prefix.replace(PREFIX, ""):
        raise CheckpointError(f"{stored.folder}: {min(keys)} does not belong to any layer of a Mixtral.")


def _of_module(
    stored: StoredWeights, weight: Weight, name: str, key: str, scheme: LoRA, dims: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a kind of layer, of every layer and expert."""
    assert weight.adapted
    entry = stored.tensors[key]
    whole, size = nemo_shape(weight, name, scheme.dim, dims), tuple(entry.size)
    shared = weight.per_expert and len(size) == len(whole) - 1
    if size != (whole[:1] + whole[2:] if shared else whole):
        raise CheckpointError(
            f"{stored.folder}: {key} has shape {list(size)}, but the base and dim={scheme.dim} require {list(whole)}."
        )
    boxes = stored.boxes(key)
    there = {layer for box in boxes for layer in range(box.offsets[0], box.offsets[0] + box.sizes[0])}
    for layer, expert in instances(weight, dims):
        place = tuple(number for number in (layer, None if shared else expert) if number is not None)
        one = size[len(place) :]
        tensor = torch.zeros(one, dtype=entry.properties.dtype)  # of layers NeMo's target_modules left out, as peft's
        if layer in there:
            offsets, sizes = place + (0,) * len(one), (1,) * len(place) + one
            stored.read_into([Shard(key, tensor, offsets, sizes, size)])
        elif isinstance(scheme, DoRA):
            raise CheckpointError(
                f"{stored.folder}: {key} has no layer {layer}; mixtral-recipes supports DoRA only on all layers of a "
                "kind."
            )
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{stored.folder}: {key} of layer {layer} contains NaN or Inf and cannot be converted."
            )
        if name == "magnitude" and weight.transform == "stack":
            tensor = _gates_first(tensor, len({box.offsets[-1] for box in boxes}))
        ours = names.tensor_key(weight.adapted.format(layer=layer, expert=expert), name)
        yield ours, tensor.view(adapter_shape(weight, name, scheme.dim, dims))


def _gates_first(lengths: Tensor, ranks: int) -> Tensor:
    """DoRA's lengths of a gated layer, all of the gate's first.

    NeMo cuts them by tensor-parallel rank without parting gate and up projection: each rank's begin with its gate's.
    """
    return lengths.view(ranks, 2, -1).transpose(0, 1).reshape(-1)


def module_of(weight: Weight) -> str:
    """A layer's name on disk, stacked: ``decoder.layers.self_attention.linear_qkv``."""
    return weight.disk.removesuffix(".weight")


def nemo_shape(weight: Weight, name: str, dim: int, dims: ModelShape) -> tuple[int, ...]:
    """Shape of a tensor in NeMo's checkpoint: stacked over layers, and over experts where a weight is per expert.

    Args:
        weight: The adapted weight.
        name: "lora_a", "lora_b" or "magnitude".
        dim: The rank.
        dims: The model's sizes.
    """
    *stacked, rows, columns = disk_shape(weight, dims)
    return (*stacked, *{"lora_a": (dim, columns), "lora_b": (rows, dim), "magnitude": (rows,)}[name])


def adapter_shape(weight: Weight, name: str, dim: int, dims: ModelShape) -> tuple[int, ...]:
    """Shape of one layer's and expert's tensor in a checkpoint of ours (`peft.adapter.Adapter`); as `nemo_shape`."""
    rows, columns = disk_shape(weight, dims)[-2:]
    halves = (2, rows // 2) if weight.transform == "stack" else (rows,)
    return {"lora_a": (dim, columns), "lora_b": (*halves, dim), "magnitude": halves}[name]
