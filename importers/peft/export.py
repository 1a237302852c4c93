"""An adapter checkpoint -> a peft folder: small, beside its base, and loaded by peft and vLLM."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_adapter
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.lineage.told import hub_origin
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.card import adapter_card
from mixtral_recipes.importers.convert.exported import describe, exported_parent
from mixtral_recipes.importers.convert.hf_to_megatron import check_room
from mixtral_recipes.importers.convert.stored_adapters import LowRank, open_adapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.peft import layouts
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import HF_WHOLE, DoRA, LoRA

CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    checkpoint: Path, output: Path, *, layout: str = "v4", base: Path | None = None, overwrite: bool = False
) -> Path:
    """Write an adapter checkpoint as a peft folder.

    Exact: every factor is copied as it was trained, whatever layout of ranks trained it; nothing is fitted or rounded.

    Args:
        checkpoint: A checkpoint of a LoRA or DoRA run.
        output: The folder to make; must not exist.
        layout: "v4", a pair of matrices per projection and expert, which peft loads under transformers 4 and 5 and
            vLLM under any; "v5", a layer's experts together, as transformers 5 holds them.
        base: A checkpoint to compare with the one the adapter was trained on; None compares nothing, since the base is
            not read.
        overwrite: Replace an existing adapter folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: it is not an adapter, it is damaged, peft cannot express it, or ``base`` is another model.
    """
    if layout != "v4" and layout != "v5":
        raise CheckpointError(f"--layout {layout} is not a known layout; use v4 or v5.")
    stored = open_adapters(checkpoint, "--format peft is for LoRA and DoRA runs; use --format hf")
    dims = hf_config.dims(read_config(checkpoint / "context"))
    _refuse_what_peft_cannot(checkpoint, stored.scheme)

    def read(layer: str) -> LowRank | None:
        return stored.read(layer, None)

    write = layouts.fused if layout == "v5" else layouts.per_projection
    found = itertools.chain(write(read, dims), layouts.whole(stored, dims))
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found}
    stored.check_all_read()
    parent = exported_parent(checkpoint, base_of(checkpoint, base) if base else None)
    settings = peft_config(stored.scheme, layout, dims, base=_base_name(parent.record))
    final = Path(os.path.abspath(output))
    with publish(final, "export", overwrite=overwrite, sources=(checkpoint, base)) as staging:
        check_room(staging, sum(tensor.nbytes for tensor in tensors.values()))
        # By Python: an error of the disk would come out of save_file as one of safetensors.
        (staging / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (staging / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        identity = Identity.of(hash_of_adapter(staging), staging)
        record = Lineage("export", identity, origin={"layout": f"peft {layout}"}, parents=(parent,))
        describe(staging, checkpoint, record, adapter_card(record, settings, layout))
    return final


def peft_config(scheme: LoRA, layout: layouts.Layout, dims: ModelShape, *, base: str) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        scheme: What was trained.
        layout: "v4" or "v5".
        dims: The base's sizes.
        base: The base model's name or path.
    """
    targets = layouts.targets(scheme, layout)
    parameters = [name for name in targets if "." in name]

    def named(name: str) -> list[str]:
        return layouts.exact(name, targets[name], scheme, dims)

    ranks: dict[str, int] = {name: scheme.dim_of(layer) for name, layer in targets.items()}
    # As a plain alpha / r, rsLoRA's scale too: peft's conversion of w1 and w3 into one parameter of twice the rank
    # keeps that ratio and no other.
    alphas = {name: scheme.scale_of(layer) * ranks[name] for name, layer in targets.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    stacked: set[str] = set()
    if layout == "v4" and (len(set(ranks.values())) > 1 or len(set(alphas.values())) > 1):
        # That conversion reads r and lora_alpha, no pattern; what stands here under the new names goes before it.
        for name, projection, joined in (("gate_up_proj", "w1", 2), ("down_proj", "w2", 1)):
            if projection not in targets:
                continue
            stacked.add(name)
            ranks[name] = joined * ranks[projection]
            alphas[name] = joined * alphas[projection]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank or name in stacked},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha or name in stacked},
        "target_modules": [one for name in sorted(targets.keys() - parameters) for one in named(name)],
        "target_parameters": [one for name in parameters for one in named(name)] or None,
        "modules_to_save": [HF_WHOLE[name] for name in scheme.modules_to_save] or None,
        # For training only, and peft has none on parameters, which experts are under transformers 5 in either layout.
        "lora_dropout": 0.0 if scheme.targets() & {"linear_fc1", "linear_fc2"} else scheme.dropout,
        "use_rslora": False,
        "use_dora": isinstance(scheme, DoRA),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _base_name(record: Lineage) -> str:
    """The base model as peft finds it: its Hub id, or the folder it was imported from."""
    base = record.parent("base")
    if base is None:
        return ""
    hub = hub_origin(base.record)
    if hub:
        return str(hub["id"]).removeprefix("hf://")
    sources = [parent.path for link in base.record.ancestors() for parent in link.parents if parent.role == "source"]
    return next((path for path in sources if path), "")


def _commonest(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _refuse_what_peft_cannot(checkpoint: Path, scheme: LoRA) -> None:
    experts = sorted(scheme.targets() & {"linear_fc1", "linear_fc2"})
    if isinstance(scheme, DoRA) and experts:
        raise CheckpointError(
            f"{checkpoint}: DoRA on the experts ({', '.join(experts)}) cannot be exported for peft, which supports "
            "DoRA on attention only; use --format hf, which merges it into the model."
        )
