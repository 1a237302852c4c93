"""A progress bar with throughput and time left, on a terminal only."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with every count of bytes done, from any thread.

    Args:
        title: What is being done.
        total: Bytes in all.
        shown: False draws nothing, as does a standard error that is not a terminal.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn as Bar
    from rich.progress import DownloadColumn as Done
    from rich.progress import Progress
    from rich.progress import TextColumn as Text
    from rich.progress import TimeRemainingColumn as Eta
    from rich.progress import TransferSpeedColumn as Speed

    columns = (Text("{task.description}"), Bar(), Done(), Speed(), Eta())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
