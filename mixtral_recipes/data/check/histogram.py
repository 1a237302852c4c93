"""The lengths of a data set, as bars in a terminal and as a PNG."""

import itertools
from pathlib import Path

import numpy as np

from mixtral_recipes.data.check.check import Report
from mixtral_recipes.system.drawing import PALETTE, blank, render, style
from mixtral_recipes.system.files import replacing

_BLOCKS = " ▏▎▍▌▋▊▉█"


def _edges(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Round borders of equally wide bins."""
    longest = max(int(lengths.max()), 1)
    step = -(-longest // bins)
    magnitude = 10 ** max(len(str(step)) - 2, 0)
    step = -(-step // magnitude) * magnitude
    return np.arange(0, longest + step, step)


def bars(report: Report) -> str:
    """A horizontal histogram of all splits' lengths: at most 16 bars, the longest of 60 characters."""
    lengths = np.concatenate([*report.lengths.values(), np.empty(0, np.int32)])
    if not len(lengths):
        return "no records"
    counts, edges = np.histogram(lengths, _edges(lengths, 16))
    digits = len(f"{int(edges[-1]):,}")
    lines = [f"{report.unit} per record"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        eighths = round(8 * 60 * count / counts.max())
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        lines.append(f"{int(low):>{digits},} - {int(high):>{digits},} │{bar} {count:,}")
    return "\n".join(lines)


def save_png(report: Report, path: Path, seq_length: int) -> None:
    """Write the histogram as a PNG, with a line at the sequence length."""
    with style():
        drawing = blank(4.4, 2.5)
        axes = drawing.figure.subplots()
        splits = [(split, lengths) for split, lengths in report.lengths.items() if len(lengths)]
        for (split, lengths), colour in zip(splits, itertools.cycle("ab")):
            axes.hist(lengths, bins=60, alpha=0.7, color=PALETTE[colour], label=f"{split} ({len(lengths):,})")
        if report.unit == "tokens":
            label = f"seq_length {seq_length}"
            axes.axvline(seq_length, color=PALETTE["soft"], linestyle="--", linewidth=0.8, label=label)
        axes.set(xlabel=f"{report.unit} per record", ylabel="records")
        axes.legend()
    with replacing(path) as staging:
        staging.write_bytes(render(drawing, "png"))
