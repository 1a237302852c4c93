"""The lengths of a data set, as bars in a terminal and as a PNG."""

from pathlib import Path

import numpy as np

from mixtral_recipes.data.check.check import Report
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system.files import replacing

_BLOCKS = " ▏▎▍▌▋▊▉█"


def _edges(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Round borders of equally wide bins."""
    longest = max(int(lengths.max()), 1)
    step = -(-longest // bins)
    magnitude = 10 ** max(len(str(step)) - 2, 0)
    step = -(-step // magnitude) * magnitude
    return np.arange(0, longest + step, step)


def bars(report: Report, *, width: int = 60, bins: int = 16) -> str:
    """A horizontal histogram of all splits' lengths.

    Args:
        report: What `check` found.
        width: Characters of the longest bar.
        bins: Most bars.
    """
    lengths = np.concatenate([*report.lengths.values(), np.empty(0, np.int32)])
    if not len(lengths):
        return "no records"
    counts, edges = np.histogram(lengths, _edges(lengths, bins))
    digits = len(f"{int(edges[-1]):,}")
    lines = [f"{report.unit} per record"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        eighths = round(8 * width * count / counts.max())
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        lines.append(f"{int(low):>{digits},} - {int(high):>{digits},} │{bar} {count:,}")
    return "\n".join(lines)


def save_png(report: Report, path: Path, seq_length: int) -> None:
    """Write the histogram as a PNG, with a line at the sequence length.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentProblem("--png needs matplotlib; pip install 'mixtral-recipes[plots]'.") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split, lengths in report.lengths.items():
        if len(lengths):
            axes.hist(lengths, bins=60, alpha=0.7, label=f"{split} ({len(lengths):,})")
    if report.unit == "tokens":
        axes.axvline(seq_length, color="0.3", linestyle="--", linewidth=1, label=f"seq_length {seq_length}")
    axes.set_xlabel(f"{report.unit} per record")
    axes.set_ylabel("records")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as staging:
        figure.savefig(staging, dpi=150)
