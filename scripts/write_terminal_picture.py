"""Draw the end of a command's output as a terminal (SVG), for the documentation.

make quickstart 2>&1 | tee quickstart.log
python scripts/write_terminal_picture.py quickstart.log docs/quickstart.svg --last 33
"""

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

_COLUMNS = 120


def main() -> None:
    """Read a log, write a picture."""
    parser = argparse.ArgumentParser(description="Draw the end of a command's output as a terminal (SVG).")
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--command", default="make quickstart", help="what the window is called")
    parser.add_argument("--last", type=int, default=33, metavar="N", help="lines shown, from the end")
    parser.add_argument("--here", default=str(Path.cwd()), help="the folder it ran in; shown as ~/mixtral-recipes")
    given = parser.parse_args()
    lines = given.log.read_text().rstrip().replace(given.here, "~/mixtral-recipes").splitlines()[-given.last :]
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text(line))
    picture = console.export_svg(title=given.command, theme=MONOKAI, unique_id="quickstart")
    given.picture.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")


if __name__ == "__main__":
    main()
