"""The README.md of an exported model: what it is and where it came from."""

from typing import Any

from mixtral_recipes.importers import hf_config

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


def model_card(manifest: dict[str, Any], config: dict[str, Any], layout: str, dtype: str) -> str:
    """Text of the model card.

    Args:
        manifest: The checkpoint's manifest; all of its ``source`` is shown, local paths excepted.
        config: config.json.
        layout: "v4" or "v5".
        dtype: The weights' dtype, as safetensors spells it.
    """
    source: dict[str, Any] = manifest["source"]
    repo = str(source.get("id", "")).removeprefix("hf://")
    shown = {"kind": manifest["kind"], "checkpoint written": manifest["created"], **source}
    shown.pop("path", None)  # a folder on someone's machine says nothing to a reader
    return _TEMPLATE.format(
        base=f"base_model: {repo}\n" if repo else "",
        title=f"{repo.split('/')[-1]} (exported)" if repo else "Mixtral (exported)",
        layers=hf_config.value(config, "num_hidden_layers"),
        experts=hf_config.value(config, "num_local_experts"),
        topk=hf_config.value(config, "num_experts_per_tok"),
        hidden=hf_config.value(config, "hidden_size"),
        dtype=dtype,
        layout=layout,
        rows="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
    )
