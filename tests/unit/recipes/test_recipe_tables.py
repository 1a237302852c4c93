"""What scripts write from the recipes is what they would write now: tables in docs/reference/recipes/, golden files."""

from mixtral_recipes.recipes import catalog
from tests.scripts import script


def test_the_tables_are_generated() -> None:
    pages = script("write_recipe_tables").pages()
    for page, text in pages.items():
        assert page.read_text() == text, "run python scripts/write_recipe_tables.py"
    written = "".join(pages.values())
    assert all(f"<!-- table: layouts {name} -->" in written for name in catalog.names())


def test_resolved_recipes_are_the_golden_files() -> None:
    for path, text in script("write_golden_recipes").files().items():
        assert path.read_text() == text, (
            f"{path.name} changed; if it should, run python scripts/write_golden_recipes.py"
        )
