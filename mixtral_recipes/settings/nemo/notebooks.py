"""A notebook as one script, line for line, and back: so that `migrate` reads its cells together."""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import RecipeError

# A line for IPython (`!pip install x`, `%time`), with those it goes on in.
_FOR_IPYTHON = re.compile(r"^([ \t]*)[!%?](?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One code cell.

    Attributes:
        number: Among all cells, from 1.
        lines: Its text, each line with its end.
        python: The same lines as Python; None if they are not valid Python.
    """

    number: int
    lines: list[str]
    python: str | None


class Notebook:
    """A Jupyter notebook's code."""

    def __init__(self, text: str) -> None:
        """Read the file's text.

        Raises:
            RecipeError: it is not a notebook.
        """
        try:
            self._data: Any = json.loads(text)
            code = [each for each in enumerate(self._data["cells"], 1) if each[1]["cell_type"] == "code"]
            self._code: list[Any] = [cell for _, cell in code]
            self.cells = [_cell(number, "".join(cell["source"])) for number, cell in code]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError("not a Jupyter notebook.") from error

    @property
    def lines(self) -> list[str]:
        """Every line of code."""
        return [line for cell in self.cells for line in cell.lines]

    @property
    def python(self) -> str:
        """The same lines as Python; cells that are not valid Python are empty lines."""
        return "".join(cell.python if cell.python is not None else "\n" * len(cell.lines) for cell in self.cells)

    def place(self, line: int) -> tuple[int, int]:
        """The cell's number and the line in it, of a line of the script."""
        for cell in self.cells:
            if line <= len(cell.lines):
                return cell.number, line
            line -= len(cell.lines)
        raise IndexError(line)

    def changed(self, lines: Sequence[str]) -> str:
        """The notebook's text with other lines of code, one for each, which may hold several."""
        rest = iter(lines)
        for source, cell in zip(self._code, self.cells, strict=True):
            text = "".join(next(rest) for _ in cell.lines).removesuffix("\n")
            source["source"] = text.splitlines(keepends=True) if isinstance(source["source"], list) else text
        return json.dumps(self._data, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, source: str) -> Cell:
    text = source + "\n" if source else ""
    return Cell(number, [line + "\n" for line in text.split("\n")[:-1]], _python(text))


def _python(text: str) -> str | None:
    for each in (text, _FOR_IPYTHON.sub(lambda found: f"{found[1]}pass" + "\n" * found[0].count("\n"), text)):
        try:
            ast.parse(each)
            return each
        except (SyntaxError, ValueError):
            continue
    return None
