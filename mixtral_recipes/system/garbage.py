"""Python's garbage collector in a process that imports thousands of modules, which all stay to its end.

With Python's own settings it looks through them again and again: a fifth of the time nemo_run and Megatron take to
import, and more than a second at exit.
"""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from mixtral_recipes.system import streams

SELDOM = (100_000, 50, 100)  # allocations before a young collection, young ones before a middle, middle before a full


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Collect seldom inside, and leave what is there then out of later collections, the interpreter's last included."""
    atexit.register(_say_no_more)  # before what runs inside registers anything, which makes it the last to be called
    usual = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.freeze()


def _say_no_more() -> None:
    """Keep Triton's library (3.9) from listing, when Python has ended, each of its types that was not collected."""
    if "triton._C.libtriton" in sys.modules and not os.environ.get("MIXTRAL_RECIPES_DEBUG"):
        streams.finish()
        streams.give_up("stderr")
