"""``mixtral-recipes report``."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; by default RUN/report.html.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write the charts as PNG files, into RUN/figures.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the files written as one line of JSON.")] = False,
) -> None:
    """Write a page about a run: loss, throughput, expert load, configuration, restarts."""
    from mixtral_recipes.reports.page import write_report

    written = [write_report(run, output)]
    if png:
        from mixtral_recipes.reports.png import write_pngs

        written += write_pngs(run)
    if json:
        print(json_module.dumps({"files": [str(path) for path in written]}))
    else:
        for path in written:
            print(f"Wrote {path}")
