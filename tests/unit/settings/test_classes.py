"""What type checkers see of ``mixtral_recipes`` is what the table of names gives at run time."""

import ast
from pathlib import Path

import mixtral_recipes as llm
from mixtral_recipes.recipes import catalog
from mixtral_recipes.settings import classes


def seen_by_type_checkers() -> dict[str, str]:
    """Name -> module of every import in the package's TYPE_CHECKING block."""
    tree = ast.parse(Path(str(llm.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for name in node.names:
            assert name.asname == name.name, "write `import X as X`, or type checkers take it for private"
            found[name.name] = str(node.module).removeprefix("mixtral_recipes.")
    return found


def test_type_checkers_see_every_name_from_its_module() -> None:
    recipes = dict.fromkeys(catalog.names(), "recipes")
    assert seen_by_type_checkers() == classes.PUBLIC | recipes


def test_every_public_name_is_in_one_of_the_tables() -> None:
    assert set(llm.__all__) == {"__version__", *classes.PUBLIC, *catalog.names()}
    assert len(llm.__all__) == len(set(llm.__all__))
