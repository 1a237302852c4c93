"""``mixtral-recipes plan``: will it fit, how long will it take, what to choose."""

from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.planning import AskOptions, GoalOptions, WorkOptions
from mixtral_recipes.cli.options.recipe import Overrides
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import note, print_json


def command(
    *,
    overrides: Overrides = None,
    ask: AskOptions,
    work: WorkOptions,
    goal: GoalOptions,
    png: Annotated[Path | None, option("--png FILE", "Draw memory by category, of all layouts shown.")] = None,
    json: Json = False,
) -> None:
    """Will it fit, how long will it take, what to choose."""
    from mixtral_recipes.cli.jobs import planning

    found = planning.answer(ask, work, goal, overrides or [])
    if png is not None:
        from mixtral_recipes.reports.memory_chart import save_png

        save_png(found.bars(), found.card.memory_gb, png)
        note(f"Wrote {png}")
    if json:
        print_json(found.as_json())
    else:
        found.show()
