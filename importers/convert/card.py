"""The README.md of an exported model: what it is and where it came from."""

import json
import shlex
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.lineage.told import COLUMNS, hub_origin, rows, settings
from mixtral_recipes.importers.convert.merge_check import MergeCheck
from mixtral_recipes.importers.convert.quantized_base import words
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.system.escapes import code_for_markdown, for_markdown, for_yaml, in_a_line

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

{merge}{provenance}
## Lineage

{lineage}

Hashes are the first digits of a SHA-256 of the content. `lineage.json` has them in full, every setting of each run, and
a hash of every tensor; `mixtral-recipes lineage FOLDER` checks them.
"""

_ADAPTER_TEMPLATE = """---
library_name: peft
pipeline_tag: text-generation
tags:
- mixtral
- lora
- mixtral-recipes
{base}---

# {kind} adapter for {name}

Rank {rank}, alpha {alpha}, on {targets}; written by `mixtral-recipes export --format peft` in the {layout} layout.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({literal})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

{use}

`THIS_FOLDER` is where this adapter is{placeholder}.

{provenance}
## Lineage

{lineage}
"""
_SCORES, _LINEAGE = "\n## Scores\n", "\n## Lineage\n"
_VLLM = """```bash
vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules adapter=THIS_FOLDER
```"""
_NO_VLLM = "vLLM cannot load this adapter: it supports LoRA (no DoRA, no modules_to_save) in the v4 layout."


def model_card(
    record: Lineage, config: dict[str, Any], layout: str, dtype: str, checked: MergeCheck | None = None
) -> str:
    """Text of the model card. It names no folder of a machine: they mean nothing to a reader.

    Args:
        record: The exported folder's lineage.
        config: config.json.
        layout: "v4" or "v5".
        dtype: The weights' dtype, as safetensors spells it.
        checked: What the comparison of a merged model's logits found; None where there was none.
    """
    hub = hub_origin(record)
    repo = str(hub.get("id", "")).removeprefix("hf://")
    return _TEMPLATE.format(
        base=f"base_model: {for_yaml(repo)}\n" if repo else "",
        title=f"{for_markdown(repo.split('/')[-1])} (exported)" if repo else "Mixtral (exported)",
        layers=hf_config.value(config, "num_hidden_layers"),
        experts=hf_config.value(config, "num_local_experts"),
        topk=hf_config.value(config, "num_experts_per_tok"),
        hidden=hf_config.value(config, "hidden_size"),
        dtype=dtype,
        layout=layout,
        merge=f"Checked when it was exported: {checked.words}.\n\n" if checked else "",
        provenance=_table(("provenance", ""), list(_provenance(record, hub).items())),
        lineage=_table(COLUMNS, [tuple(row.values()) for row in rows(record)]),
    )


def adapter_card(record: Lineage, settings: dict[str, Any], layout: str) -> str:
    """Text of an exported adapter's model card.

    Args:
        record: The exported folder's lineage.
        settings: adapter_config.json.
        layout: "v4" or "v5".
    """
    hub = hub_origin(record)
    name = str(hub["id"]).removeprefix("hf://") if hub else "BASE_MODEL"
    base_model = "" if hub else ", and `BASE_MODEL` is a Hugging Face folder of the model it was trained on"
    rank = max([settings["r"], *settings["rank_pattern"].values()])
    loads = layout == "v4" and not settings["use_dora"] and not settings.get("modules_to_save")
    return _ADAPTER_TEMPLATE.format(
        base=f"base_model: {for_yaml(name)}\n" if hub else "",
        name=for_markdown(name),
        literal=json.dumps(name),
        kind="DoRA" if settings["use_dora"] else "LoRA",
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=for_markdown(", ".join(_targets(settings))),
        layout=layout,
        use=_VLLM.format(name=shlex.quote(in_a_line(name)), rank=rank) if loads else _NO_VLLM,
        placeholder=base_model,
        provenance=_table(("provenance", ""), list(_provenance(record, hub).items())),
        lineage=_table(COLUMNS, [tuple(row.values()) for row in rows(record)]),
    )


def with_scores(card: str, found: scores.Scores) -> str:
    """A model card of ours with a table of scores before its lineage, in place of one it has.

    Args:
        card: Its text; one without that section is left as it is.
        found: What the model scored, and what it was trained from.
    """
    before, mark, lineage = card.partition(_LINEAGE)
    if not mark or not found:
        return card
    columns, rows = scores.table(found)
    table = _table(("", *columns), [tuple(row) for row in rows])
    return f"{before.partition(_SCORES)[0].rstrip()}\n{_SCORES}\n{table}{mark}{lineage}"


def _targets(settings: dict[str, Any]) -> list[str]:
    """What is adapted, once for all layers; and what is trained whole."""
    names = [*settings["target_modules"], *(settings["target_parameters"] or [])]
    whole = [f"{name} (whole)" for name in settings.get("modules_to_save") or []]
    return [*dict.fromkeys(name.rsplit(".", 1)[-1] for name in names), *whole]


def _provenance(record: Lineage, hub: dict[str, Any]) -> dict[str, Any]:
    """The Hub model it began as, and the run that wrote the weights last: its steps and what its recipe is known by."""
    found: dict[str, Any] = {"created": record.created} | hub
    into = record.origin.get("merged_into")
    found |= {"adapters merged into": words(into)} if into else {}
    runs = [link for link in record.ancestors() if link.run]
    if runs:
        last = runs[0]
        found |= {"run": last.run.get("name")} | {k: v for k, v in last.run.items() if k != "name"}
        told = settings(last)
        code = ", ".join(code_for_markdown(f"{name}={value}") for name, value in told.items())
        found |= {"recipe": _Markdown(code)} if told else {}
    return found


def _table(columns: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    made = [columns, ("---",) * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in made) + "\n"


class _Markdown(str):
    """A cell that is Markdown already."""


def _cell(value: Any) -> str:
    return value if isinstance(value, _Markdown) else for_markdown(value)
