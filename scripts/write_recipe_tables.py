"""Writes the tables in docs/reference/recipes/ from the catalog.

Each stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.

    python scripts/write_recipe_tables.py

A test runs the same and compares.
"""

import re
from pathlib import Path

from mixtral_recipes.layout import cards
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.weights import parameters
from mixtral_recipes.recipes import catalog
from mixtral_recipes.recipes.outline import Question, job_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BEGIN = re.compile(r"^<!-- table: ", re.MULTILINE)
_TABLE = re.compile(r"^(<!-- table: ([\w ]+) -->\n)(?:(?!<!--).)*(<!-- end of table -->)", re.DOTALL | re.MULTILINE)
_TASKS = {
    "pretrain": "pretraining",
    "performance": "pretraining, performance mode",
    "peft": "LoRA, DoRA, QLoRA",
    "full": "all weights",
    "full_packed": "all weights, packed",
}


def pages() -> dict[Path, str]:
    """Every page with a table -> its text with the tables as they should be."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if _BEGIN.search(text):
            found[page], count = _TABLE.subn(lambda match: match[1] + table(match[2]) + match[3], text)
            if count != len(_BEGIN.findall(text)):
                raise SystemExit(f"{page}: a table has no line <!-- end of table --> before the next one begins.")
    return found


def table(name: str) -> str:
    """A table by its name: ``recipes``, or ``layouts RECIPE``."""
    if name == "recipes":
        return recipes()
    return layouts(catalog.entry(name.removeprefix("layouts ")))


def recipes() -> str:
    """Every recipe: model, context, precision, GPUs."""
    rows = ["| recipe | model | parameters | context | precision | pretraining | adapters | all weights |"]
    rows.append("|---|---|--:|--:|---|--:|--:|--:|")
    for entry in catalog.CATALOG.values():
        counts = [entry.layout(task).topology.world_size for task in ("pretrain", "peft", "full")]
        unit = "GPUs" if entry.needs_gpu else "processes"
        size = parameters(entry.shape)
        words = f"{size / 1e9:.2f} B" if size > 1e9 else f"{size / 1e6:.1f} M"
        rows.append(
            f"| `{entry.name}` | {entry.model} | {words} | {entry.seq_length:,} | "
            f"{', '.join(entry.precisions)} | {' | '.join(f'{count} {unit}' for count in counts)} |"
        )
    return "\n".join(rows) + "\n"


def layouts(entry: catalog.RecipeEntry) -> str:
    """Every default layout of a recipe, its memory per GPU, and why it is the default."""
    rows = ["| task | GPU | nodes x GPUs | layout | memory per GPU | why |", "|---|---|--:|---|--:|---|"]
    for key, layout in entry.layouts.items():
        task, _, hardware = key.partition("@")
        card = cards.card(hardware or "h100")
        taken = memory.of_job(job_of(question(entry.name, key)), card).total
        rows.append(
            f"| {_TASKS[task]} | {card.name.upper()} | {layout.num_nodes} x {layout.num_gpus_per_node} | "
            f"{layout.topology.describe()}{', recomputed' if layout.recompute else ''} | "
            f"{taken:.0f} of {card.memory_gb:.0f} GB | "
            f"{layout.why} |"
        )
    return "\n".join(rows) + "\n"


def question(recipe: str, key: str) -> Question:
    """What to ask for one of a recipe's layouts, by its key in the catalog."""
    task, _, hardware = key.partition("@")
    return Question(
        recipe,
        "pretrain" if task in ("pretrain", "performance") else "finetune",
        hardware or "h100",
        peft_scheme="lora" if task == "peft" else "none",
        packed_sequence=task == "full_packed",
        performance_mode=task == "performance",
    )


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
