"""What a command prints: text for people on stdout or stderr, and with ``--json`` one last JSON line."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """A console on stdout; plain text when stdout is not a terminal."""
    from rich.console import Console

    # Tables are not cut to 80 columns when the output goes to a file or a pipe.
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160, highlight=False)


def note(text: str) -> None:
    """One line for the person at the terminal, on stderr so that stdout stays a result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """The result as one line of JSON, the last line of stdout."""
    sys.stdout.flush()
    print(json.dumps(value, default=str), flush=True)
