"""Write docs/reference/automodel.md from the table of NeMo AutoModel's keys."""

from pathlib import Path

from mixtral_recipes.overrides.automodel.keys import KEYS
from mixtral_recipes.settings.nemo.rules import Ignored, Only, Renamed

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "automodel.md"
_MARK = "<!-- keys -->"


def page(text: str) -> str:
    """The page with the tables below its mark made anew."""
    used = [f"| `{key}` | {rule.to} |" for key, rule in KEYS.items() if isinstance(rule, Renamed)]
    unneeded = [f"| `{key}` | {rule.why} |" for key, rule in KEYS.items() if isinstance(rule, Ignored)]
    only = [
        f"| `{key}` | {', '.join(f'`{_yaml(value)}`' for value in (rule.value, *rule.also))} | {rule.why} |"
        for key, rule in KEYS.items()
        if isinstance(rule, Only)
    ]
    parts = [
        text.partition(_MARK)[0] + _MARK + "\n",
        "## Used\n",
        "| key | becomes |\n|---|---|\n" + "\n".join(used) + "\n",
        "## Not needed\n",
        "| key | why it has no effect |\n|---|---|\n" + "\n".join(unneeded) + "\n",
        "## Refused if set to anything else\n",
        "| key | supported values | why, or what to use instead |\n|---|---|---|\n" + "\n".join(only) + "\n",
    ]
    return "\n".join(parts)


def _yaml(value: object) -> str:
    """A value as YAML spells it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
