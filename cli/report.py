"""``mixtral-recipes report``."""

from pathlib import Path
from typing import Annotated

from mixtral_recipes.cli.options.groups import option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.runs import Run
from mixtral_recipes.cli.output import print_json, say


def command(
    *,
    run: Run,
    output: Annotated[Path | None, option("--output -o FILE", "File to write; default: RUN/report.html.")] = None,
    png: Annotated[bool, option("--png", "Also write the charts as PNG files, into RUN/figures.")] = False,
    json: Json = False,
) -> None:
    """Write a page about a run: loss, throughput, expert load, restarts."""
    from mixtral_recipes.executors.runs.records import run_folder
    from mixtral_recipes.reports.page import write_report

    folder = run_folder(run)
    written = [write_report(folder, output)]
    if png:
        from mixtral_recipes.reports.charts import write_pngs

        written += write_pngs(folder)
    if json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            say(f"Wrote {path}")
