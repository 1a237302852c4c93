"""Python's garbage collector in a process that imports thousands of modules, which all stay to its end.

With Python's own settings it looks through them again and again: a fifth of the time nemo_run and Megatron take to
import, and more than a second at exit.
"""

import contextlib
import gc
from collections.abc import Iterator

SELDOM = (100_000, 50, 100)  # allocations before a young collection, young ones before a middle, middle before a full


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Collect seldom inside, and leave what is there then out of later collections, the interpreter's last included."""
    usual = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.freeze()
