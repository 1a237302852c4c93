"""The command lines that are timed are some that run."""

import sys

from benchmarks import startup
from mixtral_recipes.recipes import catalog
from tests.unit.docs.test_commands import parse


def test_every_command_exists_and_can_be_run() -> None:
    lines = [argv[3:] for argv in startup.commands(catalog.names()).values() if argv[:2] == [sys.executable, "-m"]]
    assert ["pretrain", "--recipe", "mixtral_8x3b", "--dry-run"] in lines
    for words in lines:
        if words != ["--help"]:
            parse(words)


def test_what_has_no_public_checkpoint_is_not_fine_tuned() -> None:
    tuned = {argv[5] for line, argv in startup.commands(catalog.names()).items() if line.startswith("finetune")}
    assert tuned == {name for name in catalog.names() if catalog.entry(name).base} < set(catalog.names())
