"""Writes the tables in docs/reference/nemo.md from the table of NeMo's names and arguments.

Each stands between ``<!-- nemo: NAME -->`` and ``<!-- end of nemo -->``.

    python scripts/write_nemo_guide.py

A test runs the same and compares.
"""

import re
from collections import defaultdict
from pathlib import Path

from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.names import ELSEWHERE, MODULES, NAMES
from mixtral_recipes.settings.nemo.rules import Base, Ignored, Keys, Only, Renamed, Rule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "nemo.md"
_TABLE = re.compile(r"(<!-- nemo: ([\w ]+) -->\n).*?(<!-- end of nemo -->)", re.DOTALL)


def text() -> str:
    """The page with its tables as they should be."""
    return _TABLE.sub(lambda match: f"{match[1]}{tables()[match[2]]}\n{match[3]}", PAGE.read_text())


def tables() -> dict[str, str]:
    """Every table by its name."""
    return {"modules": _modules(), "same": _same(), "warned": _warned(), "refused": _refused(), "missing": _missing()}


def _modules() -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for nemo, ours in MODULES.items():
        if ours:
            found[ours].append(f"`nemo.{nemo}`")
    rows = [f"| {', '.join(nemo)} | `mixtral_recipes.{ours}` |" for ours, nemo in sorted(found.items())]
    return _table(("NeMo 2.0", "mixtral-recipes"), rows)


def _same() -> str:
    rows = []
    for name, call in CALLS.items():
        plain = [argument for argument in call.names if argument not in call.rules]
        renamed = [f"{a} (here `{r.to}`)" for a, r in call.rules.items() if isinstance(r, Renamed)]
        if plain or renamed:
            rows.append(f"| `{name}` | {', '.join([*plain, *renamed])} |")
    return _table(("class or function", "arguments with the same effect"), rows)


def _warned() -> str:
    return _table(("argument", "why it has no effect"), _grouped(Ignored))


def _refused() -> str:
    return _table(("argument", "supported value", "why, or what to use instead"), _grouped(Only))


def _grouped(kind: type) -> list[str]:
    """Rows of one kind; arguments of a class that share their reason share a row."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, call in CALLS.items():
        for argument, rule in call.rules.items():
            if isinstance(rule, kind):
                found[name, *_columns(rule)].append(argument)
            elif kind is Ignored and isinstance(rule, Keys):
                found[name, f"only these keys are read: {', '.join(rule.known)}"].append(argument)
    return [f"| `{key[0]}`: {', '.join(names)} | {' | '.join(key[1:])} |" for key, names in found.items()]


def _columns(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Only):
        return (f"`{rule.value!r}`", rule.why)
    assert isinstance(rule, Ignored)
    return (rule.why,)


def _missing() -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for name, rule in NAMES.items():
        if isinstance(rule, Renamed):
            found[f"use `{rule.to}`"].append(f"`{name}`")
        elif isinstance(rule, Ignored):
            found[f"accepted with a warning: {rule.why}"].append(f"`{name}`")
        elif isinstance(rule, Base):
            found[f"an empty class: {rule.why}"].append(f"`{name}`")
        else:
            found[rule.why].append(f"`{name}`")
    for module, why in ELSEWHERE.items():
        found[why].append(f"`nemo.{module}`" if module else "everything else")
    return _table(
        ("NeMo's name", "in mixtral-recipes"), [f"| {', '.join(names)} | {why} |" for why, names in found.items()]
    )


def _table(columns: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows])


if __name__ == "__main__":
    PAGE.write_text(text())
