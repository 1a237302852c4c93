"""Progress bars, drawn by rich and on a terminal only."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

Unit = Literal["bytes", "records", "steps"]


def terminal_bar(unit: Unit, stream: TextIO, *, known: bool = True, stays: bool = False) -> "Progress | None":
    """A bar that is not started yet; None if the stream is not a terminal.

    Args:
        unit: What is counted. Bytes are shown with their speed; a task in steps has a field ``facts``, text that
            follows the bar.
        stream: Where to draw.
        known: Whether the total is known; otherwise the elapsed time is shown instead of the remaining time.
        stays: Whether the bar stays when it is finished.
    """
    if not stream.isatty():
        return None
    from rich import progress as rich_progress
    from rich.console import Console

    columns: list[rich_progress.ProgressColumn] = [
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn() if unit == "bytes" else rich_progress.MofNCompleteColumn(),
    ]
    if unit == "bytes":
        columns.append(rich_progress.TransferSpeedColumn())
    if unit == "steps":
        columns += [rich_progress.TextColumn("{task.fields[facts]}"), rich_progress.TextColumn("ETA")]
    columns.append(rich_progress.TimeRemainingColumn() if known else rich_progress.TimeElapsedColumn())
    return rich_progress.Progress(*columns, console=Console(file=stream), transient=not stays)


@contextlib.contextmanager
def progress_bar(
    title: str, total: int | None, *, unit: Unit = "bytes", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, and a function to call with every count done, from any thread.

    Args:
        title: What is being done.
        total: How much there is in all; None if that is not known.
        unit: What is counted.
        shown: False draws nothing, as does a standard error that is not a terminal.
    """
    bar = terminal_bar(unit, sys.stderr, known=total is not None) if shown else None
    if bar is None:
        yield lambda count: None
        return
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
