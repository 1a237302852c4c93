"""The README.md of an exported model: what it is and where it came from."""

from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.system.files import read_json

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


# What a recipe is known by, of the hundreds of settings run.json lists.
_TOLD = (
    "model.config.class",
    "peft.class",
    "peft.dim",
    "peft.alpha",
    "data.class",
    "data.seq_length",
    "data.global_batch_size",
    "optim.config.lr",
    "trainer.max_steps",
    "trainer.plugins.precision",
)


def provenance(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint came from, without the folders of a machine, which mean nothing to a reader.

    Args:
        checkpoint: The checkpoint folder; ``context/run.json`` of a training run adds what it knows.
        manifest: Its manifest.

    Returns:
        "kind", "created", and what is known of: "id" and "revision" of the Hub model it began as, "layout" of the files
        it was imported from, "run", "step", "consumed_samples" and "recipe", the settings of `_TOLD`.
    """
    found = {"kind": manifest["kind"], "created": manifest["created"]}
    found |= {key: value for key, value in manifest["source"].items() if key != "path" and value is not None}
    facts = _run_facts(checkpoint)
    found |= {key: facts[key] for key in ("run", "step", "consumed_samples") if key in facts}
    recipe = {key: value for key, value in facts.get("recipe", {}).items() if key in _TOLD and value is not None}
    return found | _hub_origin(facts) | ({"recipe": recipe} if recipe else {})


def _run_facts(checkpoint: Path) -> dict[str, Any]:
    """What a training run recorded; nothing for an imported checkpoint."""
    return read_json(checkpoint / "context" / "run.json") or {}


def _hub_origin(facts: dict[str, Any]) -> dict[str, Any]:
    """The Hub model at the end of a chain of bases; nothing if a base is gone or came from a folder."""
    seen: set[str] = set()
    while (base := facts.get("base")) and base not in seen:
        seen.add(base)
        try:
            source = read_manifest(Path(base))["source"]
        except CheckpointError:
            return {}
        if "id" in source:
            return {key: source[key] for key in ("id", "revision") if key in source}
        facts = _run_facts(Path(base))
    return {}


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
        rows="\n".join(f"| {name} | {_cell(value)} |" for name, value in origin.items()),
    )


def _cell(value: Any) -> str:
    """A value in one cell of a Markdown table."""
    if isinstance(value, dict):
        value = ", ".join(f"`{key}={setting}`" for key, setting in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
