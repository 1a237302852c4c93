"""``mixtral-recipes recipes``: list, show and compare."""

import re
from pathlib import Path
from typing import Annotated, Any

from mixtral_recipes.cli.options.groups import App, argument, option
from mixtral_recipes.cli.options.recipe import Overrides
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import console, print_json, print_table, table
from mixtral_recipes.layout import cards
from mixtral_recipes.planner import memory, search
from mixtral_recipes.recipes import catalog
from mixtral_recipes.recipes.outline import Question, job_of

app = App("List, show and compare recipes.")


def complete_spec(incomplete: str) -> list[str]:
    """Recipes with their tasks."""
    specs = [f"{name}.{task}" for name in catalog.names() for task in catalog.TASKS]
    return [spec for spec in specs if spec.startswith(incomplete)]


Spec = Annotated[
    str,
    argument(
        "RECIPE",
        "A recipe, such as mixtral_8x7b.pretrain or mixtral_8x7b.finetune(num_nodes=2), your MODULE.FUNCTION, or "
        "a YAML file.",
        autocompletion=complete_spec,
    ),
]


@app.command("list")
def list_command(json: Json = False) -> None:
    """List every recipe: model, context, precision, GPUs, layouts, memory, the fewest GPUs it fits on."""
    rows = [row(entry) for entry in catalog.CATALOG.values()]
    if json:
        print_json({"recipes": rows})
        return
    print_table(table(rows[0], [values.values() for values in rows]))


def row(entry: catalog.RecipeEntry) -> dict[str, Any]:
    """One recipe's row, from the static catalog."""
    pretrain, peft = entry.layout("pretrain"), entry.layout("peft")
    return {
        "recipe": entry.name,
        "model": entry.model,
        "context": entry.seq_length,
        "precision": ", ".join(entry.precisions),
        "pretrain": f"{gpus(pretrain, entry)}: {sizes(pretrain)}",
        "lora": f"{gpus(peft, entry)}: {sizes(peft)}",
        "GB per GPU": " / ".join(_memory(entry, task) for task in ("pretrain", "finetune")),
        "smallest": smallest(entry),
    }


def _memory(entry: catalog.RecipeEntry, task: str) -> str:
    """Memory of the default layout of pretraining or of LoRA, on the fullest GPU."""
    card = cards.card("h100" if entry.needs_gpu else "cpu")
    job = job_of(Question(entry.name, task))
    return f"{memory.of_job(job if entry.needs_gpu else job.on_cpu(), card).total:.1f}"


def smallest(entry: catalog.RecipeEntry) -> str:
    """The fewest H100 that hold LoRA."""
    if not entry.needs_gpu:
        return "runs on a CPU"
    return f"lora {search.fewest(job_of(Question(entry.name)), cards.card('h100')) or '-'} x H100"


def gpus(layout: catalog.Layout, entry: catalog.RecipeEntry) -> str:
    """How many GPUs (or processes) a layout takes."""
    return f"{layout.topology.world_size} {'GPUs' if entry.needs_gpu else 'processes'}"


def sizes(layout: catalog.Layout) -> str:
    """The layout's sizes that are not 1."""
    words = layout.topology.describe().split()
    return " ".join(w for w in words if not w.startswith("DP") and (w.startswith("ETP") or not w.endswith("P1")))


@app.command("show")
def show_command(
    spec: Spec,
    overrides: Overrides = None,
    yaml: Annotated[bool, option("--yaml", "As YAML, ready for `run`.")] = False,
    all: Annotated[bool, option("--all", "Also show settings left at their defaults.")] = False,
    json: Json = False,
) -> None:
    """Show a recipe's resolved configuration, as a tree or as YAML."""
    recipe = resolved(spec, overrides or [])
    from mixtral_recipes.overrides.inspection import flat, overview

    about = overview(recipe, _name(spec))
    if json:
        print_json({"recipe": spec, **about, "settings": flat(recipe, defaults=all)})
    elif yaml:
        from mixtral_recipes.overrides.yaml_file import to_yaml

        print(to_yaml(recipe, name=_name(spec)), end="")
    else:
        _print_overview(about)
        _print_tree(spec, flat(recipe, defaults=all))


def _name(spec: str) -> str | None:
    """The recipe of ours that a spec names; of a file, the one it was made from."""
    if not spec.endswith((".yaml", ".yml")):
        name = re.split(r"[.(]", spec, maxsplit=1)[0]
        return name if name in catalog.CATALOG else None
    from mixtral_recipes.overrides.yaml_file import header

    return header(Path(spec))[0]


def _print_overview(about: dict[str, Any]) -> None:
    model, layout = about["model"], about["layout"]
    count = model["parameters"]
    words = f"{count / 1e9:.2f} B" if count > 1e9 else f"{count / 1e6:.1f} M"
    print(
        f"model   {model['num_layers']} layers of width {model['hidden_size']}, {model['num_attention_heads']} heads "
        f"in {model['num_query_groups']} groups, {model['num_moe_experts']} experts, {words} parameters"
    )
    print(f"layout  {layout['num_nodes']} x {layout['num_gpus_per_node']} processes: {layout['topology']}")
    if about["trained"]:
        from mixtral_recipes.peft.count import told

        print(f"trains  {told(about['trained'])}")
    print(f"why     {about['why'] or 'not one of our default layouts'}\n")


def _print_tree(title: str, settings: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(title)}")
    branches: dict[str, Tree] = {"": tree}
    for path, value in settings.items():
        parent, _, name = path.rpartition(".")
        is_part = any(other.startswith((f"{path}.", f"{path}[")) for other in settings)
        text = f"{name}: {value}" if is_part or path.endswith("]") else f"{name} = {value!r}"
        above = branches.get(parent, tree)
        branches[path] = above.add(f"[cyan]{escape(text)}" if is_part else escape(text))
    console().print(tree)


@app.command("diff")
def diff_command(
    a: Spec,
    b: Annotated[
        str | None, argument("RECIPE", "Another recipe; leave it out to compare the first with overrides.")
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Compare two recipes, or a recipe with itself plus overrides (which apply to the second)."""
    changes = list(overrides or [])
    if b is None or "=" in b.partition("(")[0]:
        changes, b = [*([b] if b else []), *changes], a
    from mixtral_recipes.overrides.inspection import differences

    found = differences(resolved(a, []), resolved(b, changes))
    if json:
        print_json({"differences": [{"path": path, "a": x, "b": y} for path, x, y in found]})
        return
    if not found:
        print("No difference.")
        return
    titles = ("setting", a, b if b != a else "with overrides")
    print_table(table(titles, [(path, _text(x), _text(y)) for path, x, y in found]))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def resolved(spec: str, overrides: list[str]) -> Any:
    """A recipe by its name or file, with overrides applied."""
    from mixtral_recipes.overrides import paths as dotted
    from mixtral_recipes.overrides.inspection import recipe_of

    recipe = recipe_of(spec)
    dotted.apply(recipe, overrides)
    return recipe
