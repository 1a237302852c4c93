"""Ends a rank that makes no progress, and writes every thread's stack, so that one lost rank does not hang a job.

When one rank dies or hangs, the others wait in a collective inside C, where neither Python's signal handlers nor
exceptions reach them. A separate thread can still write down where each one is, and end the process. The first rank
to do so stays for a while: when it is gone the others' collectives fail, or their launcher ends them, and where they
waited is lost.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_recipes.errors import LaunchError

# Ranks that wait for one another find that out some seconds apart: they look once a second, and begin a step together.
SECONDS_FOR_THE_OTHERS = 10.0

# Called with the error before a rank is ended, so that whoever started it can record how it ended.
before_exit: list[Callable[[BaseException], object]] = []


class Watchdog:
    """Watches one rank of a run.

    Attributes:
        limit: Seconds without progress after which the rank is ended.
        folder: Where each rank's stacks are written.
        rank: This rank.
    """

    def __init__(self, limit: float, folder: Path, rank: int) -> None:
        self.limit = limit
        self.folder = folder
        self.rank = rank
        self._last = time.monotonic()
        self._doing = "starting"
        self._done = threading.Event()
        self._parent = os.getppid()

    def alive(self, doing: str) -> None:
        """A sign of life.

        Args:
            doing: What begins now, for the message ("step 12").
        """
        self._last = time.monotonic()
        self._doing = doing

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch until the block ends."""
        self._last = time.monotonic()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join(timeout=5)

    def _watch(self) -> None:
        pause = min(1.0, self.limit / 10)
        while not self._done.wait(pause):
            idle = time.monotonic() - self._last
            if idle > self.limit:
                self._end(f"no progress for {idle:.0f} s in {self._doing}: a rank was lost or is hanging", stay=True)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
                self._end("the process that started this rank is gone")

    def _end(self, reason: str, *, stay: bool = False) -> None:
        path = self.folder / f"rank-{self.rank}.txt"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"rank {self.rank}, process {os.getpid()}: {reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        error = LaunchError(
            f"rank {self.rank}: {reason} (trainer.hang_timeout_seconds={self.limit:g}); every rank's stack is in "
            f"{self.folder}."
        )
        with contextlib.suppress(Exception):
            print(f"error: {error}", file=sys.stderr, flush=True)
        for hook in before_exit:
            with contextlib.suppress(Exception):
                hook(error)
        if stay:
            time.sleep(min(SECONDS_FOR_THE_OTHERS, self.limit / 2))
        os._exit(error.exit_code)
