"""What a command prints: text for people on stdout or stderr, and with ``--json`` one last JSON object."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mixtral_recipes.system.escapes import in_a_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mixtral_recipes.executors.checks import Check

_PIPE_WIDTH = 160
_WIDEST = 10_000


def console(*, width: int = _PIPE_WIDTH) -> "Console":
    """A console on stdout; where stdout is not a terminal, plain text of this width."""
    from rich.console import Console

    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else width, highlight=False)


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> "Table":
    """A table as every command prints it: no lines, two spaces between columns; numbers are aligned to the right."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    kept = [list(row) for row in rows]
    for number, title in enumerate(columns):
        of_numbers = bool(kept) and all(isinstance(row[number], int | float) for row in kept)
        made.add_column(escape(title), justify="right" if of_numbers else "left", overflow="fold")
    for row in kept:
        made.add_row(*(escape(in_a_line(cell)) for cell in row))
    return made


def print_table(made: "Table") -> None:
    """Print a table; in a file or a pipe each row is one line, however long."""
    console(width=_WIDEST).print(made)


def in_gb(nbytes: int) -> str:
    """A size in GB, or in MB where that would be next to nothing."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def note(text: str) -> None:
    """One line for the person at the terminal, on stderr so that stdout stays a result."""
    print(printable(text), file=sys.stderr, flush=True)


def say(text: object) -> None:
    """A line of the result, on stdout."""
    print(printable(text), flush=True)


def say_part(text: str) -> None:
    """A piece of what a model says, as it comes; in a file or a pipe as it is."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def print_json(value: dict[str, Any]) -> None:
    """The result as one line of JSON, the last line of stdout."""
    sys.stdout.flush()
    print(json.dumps(value, default=str), flush=True)


def print_checks(checks: "list[Check]") -> None:
    """One line for each finding, and below it how to fix it."""
    for check in checks:
        verdict = {"good": "ok  ", "note": "note", "bad": "BAD "}[check.verdict]
        print(f"{verdict} {check.name:20} {in_a_line(check.finding)}")
        if check.mend:
            print(f"     {'':20} -> {in_a_line(check.mend)}")
