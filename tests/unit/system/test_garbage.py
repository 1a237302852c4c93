"""Processes that import a lot are not searched for garbage again and again, and what they imported not at exit."""

import gc
import subprocess
import sys

from mixtral_recipes.system.garbage import seldom_collected

COUNTED = """
import gc
collections = []
from mixtral_recipes.cli import main
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "start" else None)
main.run = lambda argv: [[] for _ in range(60_000)] and 0
try:
    main.main()
except SystemExit:
    print(len(collections))
"""


def test_settings_are_given_back_and_what_is_there_is_frozen() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        with seldom_collected():
            assert gc.get_threshold()[0] > usual[0]
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_a_command_is_not_searched_while_it_makes_things() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1
