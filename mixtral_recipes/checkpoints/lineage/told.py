"""A lineage in words, for the command line, the model card and a run's report."""

from typing import Any

from mixtral_recipes.checkpoints.lineage.identity import short
from mixtral_recipes.checkpoints.lineage.record import Lineage

COLUMNS = ("link", "what", "weights", "tokenizer", "data", "code")
# What a recipe is known by, of the hundreds of settings a record holds.
_TOLD = (
    "model.config.class", "peft.class", "peft.dim", "peft.alpha", "peft.bits", "data.class", "data.seq_length",
    "data.global_batch_size", "optim.config.lr", "trainer.max_steps", "trainer.plugins.precision",
)  # fmt: skip


def rows(record: Lineage) -> list[dict[str, str]]:
    """One row per link, the nearest first, under `COLUMNS`; no folder of a machine is named."""
    return [row(link) for link in record.ancestors()]


def row(record: Lineage) -> dict[str, str]:
    """One link under `COLUMNS`."""
    data = record.data
    return {
        "link": record.kind,
        "what": what(record),
        "weights": short(record.identity.weights) if record.identity.weights else "-",
        "tokenizer": short(record.identity.tokenizer) if record.identity.tokenizer else "-",
        "data": f"{data.get('form', '?')} {short(data['sha256']) if 'sha256' in data else ''}".strip() if data else "-",
        "code": record.code if record.kind != "source" else "-",
    }


def what(record: Lineage) -> str:
    """What a link is, in a few words."""
    if record.kind == "source":
        return source_name(record)
    if record.run:
        return f"run {record.run.get('name')}, step {record.run.get('step')}"
    if "merged" in record.origin:
        return str(record.origin["merged"])
    layout = record.origin.get("layout", "")
    exported = layout if layout.startswith("GGUF") else f"{layout} layout"
    return {"model": "imported", "export": exported}.get(record.kind, record.kind)


def source_name(record: Lineage) -> str:
    """A source as a reader knows it: ``hf://org/name@revision``, or the name of a folder."""
    origin = record.origin
    if "id" in origin:
        return f"{origin['id']}@{origin['revision']}" if origin.get("revision") else str(origin["id"])
    return f"folder {origin.get('folder', '(unnamed)')}"


def settings(record: Lineage) -> dict[str, Any]:
    """What a run's recipe is known by."""
    return {name: record.recipe[name] for name in _TOLD if record.recipe.get(name) is not None}


def hub_origin(record: Lineage) -> dict[str, Any]:
    """``id`` and ``revision`` of the Hub model the weights began as; empty where they began elsewhere."""
    found = [link.origin for link in record.ancestors() if "id" in link.origin]
    return {key: found[-1][key] for key in ("id", "revision") if key in found[-1]} if found else {}
