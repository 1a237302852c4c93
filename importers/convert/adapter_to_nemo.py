"""An adapter checkpoint of ours -> NeMo 2.0's: the adapter alone, every factor as it was trained."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_adapter
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.exported import exported_parent
from mixtral_recipes.importers.convert.hf_to_megatron import check_room
from mixtral_recipes.importers.convert.megatron_to_nemo import write_common, write_context
from mixtral_recipes.importers.convert.nemo_to_adapter import METADATA, TENSORS, module_of, nemo_shape
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters, open_adapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import WEIGHTS, instances
from mixtral_recipes.importers.model_weights import PREFIX
from mixtral_recipes.importers.nemo.fiddle_json import TARGET
from mixtral_recipes.importers.recognise import Form, recognise
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import DoRA, LoRA

_README = """# An adapter for NeMo 2.0

Written by `mixtral-recipes export --format nemo-peft`. `weights/adapter_metadata.json` names its base model,
`{base}`; {how}.
"""


def export_nemo_adapter(checkpoint: Path, output: Path, *, base: Path | None = None, overwrite: bool = False) -> Path:
    """Write an adapter checkpoint in NeMo 2.0's format.

    Args:
        checkpoint: A checkpoint of a LoRA or DoRA run.
        output: The folder to make; must not exist.
        base: A checkpoint to compare with the one the adapter was trained on; None compares nothing, since the base is
            not read.
        overwrite: Replace an existing export.

    Returns:
        The folder.

    Raises:
        CheckpointError: it is not an adapter, it is damaged, NeMo cannot express it, or ``base`` is another model.
    """
    stored = open_adapters(checkpoint, "--format nemo-peft is for LoRA and DoRA runs; use --format nemo")
    parent = exported_parent(checkpoint, base_of(checkpoint, base) if base else None)
    config = read_config(checkpoint / "context")
    settings = transform_settings(checkpoint, stored.scheme)
    shards = list(_shards(checkpoint, stored, hf_config.dims(config)))
    final = Path(os.path.abspath(output))
    with publish(final, "export", overwrite=overwrite, sources=(checkpoint, base)) as staging:
        check_room(staging, sum(shard.nbytes for shard in shards))
        _write_weights(staging / "weights", shards)
        named, how = _nemo_base(parent.record, final)
        (staging / "weights" / METADATA).write_text(json.dumps({"model_ckpt_path": named}))
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        context = checkpoint / "context"
        write_context(staging / "context", context, config, str(dtype), settings)
        (staging / "README.md").write_text(_README.format(base=named, how=how))
        identity = Identity.of(hash_of_adapter(staging), staging)
        lineage.write(staging, Lineage("export", identity, origin={"layout": "nemo adapter"}, parents=(parent,)))
    return final


def transform_settings(checkpoint: Path, scheme: LoRA) -> dict[str, Any]:
    """NeMo's ``model_transform`` for a scheme, in the plain form of `fiddle_json`.

    Raises:
        CheckpointError: layers have ranks or scales of their own, which NeMo does not know.
    """
    layers = sorted(scheme.targets())
    if scheme.modules_to_save:
        raise CheckpointError(
            f"{checkpoint}: {' and '.join(scheme.modules_to_save)} trained in full along with the adapters, which "
            "NeMo's adapter format cannot hold; use --format nemo, which merges the adapter into the model."
        )
    dims = {scheme.dim_of(layer) for layer in layers}
    scales = {scheme.scale_of(layer) for layer in layers}
    if len(dims) > 1 or len(scales) > 1:
        raise CheckpointError(
            f"{checkpoint}: its layers have different ranks or scales ({scheme.rank_pattern}, {scheme.alpha_pattern}), "
            "but NeMo has one for all layers; use --format nemo, which merges the adapter into the model."
        )
    dim = dims.pop()
    alpha = scales.pop() * dim  # rsLoRA's scale too, which NeMo has no word for
    kind = "dora.DoRA" if isinstance(scheme, DoRA) else "lora.LoRA"
    return {
        TARGET: f"nemo.collections.llm.peft.{kind}",
        "target_modules": layers,
        "dim": dim,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "dropout": scheme.dropout,
        "dropout_position": scheme.dropout_position,
    }


def _shards(checkpoint: Path, stored: StoredAdapters, dims: ModelShape) -> Iterator[Shard]:
    """Every factor at its place among the stacked ones."""
    for weight in WEIGHTS:
        if not weight.adapted or weight.adapted.rpartition(".")[2] not in stored.scheme.targets():
            continue
        for layer, expert in instances(weight, dims):
            name = weight.adapted.format(layer=layer, expert=expert)
            adapter = stored.read(name, None)
            if adapter is None:
                raise CheckpointError(
                    f"{checkpoint}: {name} has no adapter, but NeMo needs one on every layer of a kind."
                )
            place = tuple(number for number in (layer, expert) if number is not None)
            factors: dict[str, Tensor | None] = {"lora_a": adapter.a, "lora_b": adapter.b}
            factors["magnitude"] = adapter.magnitude
            for kind, tensor in factors.items():
                if tensor is None:
                    continue
                whole = nemo_shape(weight, kind, tensor.shape[0] if kind == "lora_a" else tensor.shape[-1], dims)
                sizes = (1,) * len(place) + tuple(tensor.shape)
                offsets = place + (0,) * tensor.dim()
                key = f"{PREFIX}{module_of(weight)}.adapter.{TENSORS[kind]}"
                yield Shard(key, tensor.contiguous(), offsets, sizes, whole)
    stored.check_all_read()


def _write_weights(folder: Path, shards: list[Shard]) -> None:
    """Write the torch_dist folder."""
    from mixtral_recipes.checkpoints.format.writer import write_file, write_metadata

    folder.mkdir()
    file = write_file(folder, 0, shards, {})
    write_metadata(folder, [file])
    write_common(folder)


def _nemo_base(parent: Lineage, final: Path) -> tuple[str, str]:
    """The NeMo checkpoint of the base: where it was imported from, or where it is to be exported to; and how."""
    base = parent.parent("base")
    source = base.record.parent("source") if base else None
    if source and source.path and os.access(source.path, os.R_OK) and recognise(Path(source.path)).form is Form.NEMO:
        return str(recognise(Path(source.path)).folder), "it was imported from there"
    named = f"{final}-base"
    where = base.path if base and base.path else "BASE"
    return named, f"create it with `mixtral-recipes export {where} {named} --format nemo`, or put another path there"
