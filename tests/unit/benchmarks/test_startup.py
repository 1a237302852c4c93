"""The command lines that are timed are some that run."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.recipes import catalog
from tests.unit.docs.test_commands import parse


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which imports another module of its folder as scripts do."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("startup")


def test_every_command_exists_and_can_be_run(startup: Any) -> None:
    lines = [argv[3:] for argv in startup.commands(catalog.names()).values() if argv[:2] == [sys.executable, "-m"]]
    assert ["pretrain", "--recipe", "mixtral_8x3b", "--dry-run"] in lines
    for words in lines:
        if words != ["--help"]:
            parse(words)


def test_what_has_no_public_checkpoint_is_not_fine_tuned(startup: Any) -> None:
    tuned = {argv[5] for line, argv in startup.commands(catalog.names()).items() if line.startswith("finetune")}
    assert tuned == {name for name in catalog.names() if catalog.entry(name).base} < set(catalog.names())
