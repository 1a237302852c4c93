"""The folder a benchmark writes into, gone when it ends, however it is ended."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder, below the one given or where temporary files are.

    SIGTERM becomes an exception: what it ends without one leaves its folder, gigabytes of it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
