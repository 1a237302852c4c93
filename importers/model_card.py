"""The README.md of an exported model: what it is and where it came from."""

import json
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers import hf_config
from mixtral_recipes.training.manifest import read_manifest

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixtral
- mixtral-recipes
{base}---

# {title}

A Mixtral of {layers} layers and {experts} experts (top {topk}), hidden size {hidden}, {dtype} weights in the {layout}
layout, written by `mixtral-recipes export`.

| provenance | |
|---|---|
{rows}

Every tensor's SHA-256 is in `mixtral-recipes.json`.
"""


def provenance(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint came from, without folders of someone's machine: they say nothing to a reader.

    Args:
        checkpoint: The checkpoint folder; ``context/run.json`` of a training run adds what it knows.
        manifest: Its manifest.

    Returns:
        "kind", "created", and what is known of: "id" and "revision" of the Hub model it began as, "run", "step",
        "consumed_samples", "recipe".
    """
    found = {"kind": manifest["kind"], "created": manifest["created"]}
    found |= {key: value for key, value in manifest["source"].items() if key != "path" and value is not None}
    try:
        facts = json.loads((checkpoint / "context" / "run.json").read_text())
        found |= {key: facts[key] for key in ("run", "step", "consumed_samples") if key in facts}
        if facts.get("base"):
            base = read_manifest(Path(facts["base"]))["source"]
            found |= {key: base[key] for key in ("id", "revision") if key in base}
    except (OSError, ValueError, CheckpointError):
        pass  # an imported model has no run, and a base may have gone
    return found


def model_card(origin: dict[str, Any], config: dict[str, Any], layout: str, dtype: str) -> str:
    """Text of the model card.

    Args:
        origin: As `provenance` returns it; all of it is shown.
        config: config.json.
        layout: "v4" or "v5".
        dtype: The weights' dtype, as safetensors spells it.
    """
    repo = str(origin.get("id", "")).removeprefix("hf://")
    return _TEMPLATE.format(
        base=f"base_model: {repo}\n" if repo else "",
        title=f"{repo.split('/')[-1]} (exported)" if repo else "Mixtral (exported)",
        layers=hf_config.value(config, "num_hidden_layers"),
        experts=hf_config.value(config, "num_local_experts"),
        topk=hf_config.value(config, "num_experts_per_tok"),
        hidden=hf_config.value(config, "hidden_size"),
        dtype=dtype,
        layout=layout,
        rows="\n".join(f"| {name} | {value} |" for name, value in origin.items()),
    )
