"""Processes that import a lot are not searched for garbage again and again, and what they imported not at exit."""

import gc
import os
import subprocess
import sys

import pytest

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


ENDED = """
import atexit, os, sys
atexit.register(os.write, 2, b"leaked")  # called last, as libraries are when Python has ended
from mixtral_recipes.cli import main
def run(argv):
    atexit.register(os.write, 2, b"said ")
    sys.modules[os.environ["LOADED"]] = sys
    return 0
main.run = run
main.main()
"""


@pytest.mark.parametrize(
    ("loaded", "debug", "said"),
    [
        ("triton._C.libtriton", "", "said "),
        ("triton._C.libtriton", "1", "said leaked"),
        ("triton._C.other", "", "said leaked"),
    ],
)
def test_tritons_list_of_what_was_not_collected(loaded: str, debug: str, said: str) -> None:
    env = os.environ | {"LOADED": loaded, "MIXTRAL_RECIPES_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, check=True, env=env)
    assert done.stderr == said
