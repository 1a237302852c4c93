"""What scripts write from the recipes is what they would write now: tables in docs/reference/recipes/, golden files."""

from pathlib import Path

import pytest

from mixtral_recipes.recipes import catalog
from tests.scripts import script


def test_the_tables_are_generated() -> None:
    pages = script("write_recipe_tables").pages()
    for page, text in pages.items():
        assert page.read_text() == text, "run python scripts/write_recipe_tables.py"
    written = "".join(pages.values())
    assert all(f"<!-- table: layouts {name} -->" in written for name in catalog.names())


def test_a_table_without_its_end_takes_no_text_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("write_recipe_tables")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    ends = "<!-- table: layouts mixtral_tiny -->\n<!-- end of table -->\n"
    (tmp_path / "new.md").write_text(ends)
    assert "| task |" in tables.pages()[tmp_path / "new.md"]
    (tmp_path / "new.md").write_text(f"<!-- table: recipes -->\n<!-- end -->\n## Text\n{ends}")
    with pytest.raises(SystemExit, match=r"new\.md: a table has no line <!-- end of table -->"):
        tables.pages()


def test_resolved_recipes_are_the_golden_files() -> None:
    for path, text in script("write_golden_recipes").files().items():
        assert path.read_text() == text, (
            f"{path.name} changed; if it should, run python scripts/write_golden_recipes.py"
        )
