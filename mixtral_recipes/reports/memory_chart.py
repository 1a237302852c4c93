"""Memory by category as a picture: one bar for each layout, against what the card has."""

from collections.abc import Mapping
from pathlib import Path

from mixtral_recipes.reports.charts import number
from mixtral_recipes.system.drawing import PALETTE, Drawing, blank, render, style
from mixtral_recipes.system.files import replacing

_WIDTH = 5.5  # inches
_SHADES = ("a", "b", "soft", "ink")  # in turn, each paler the second time


def memory_chart(bars: Mapping[str, Mapping[str, float]], capacity: float) -> Drawing:
    """Bars of memory.

    Args:
        bars: Layout -> GB by category.
        capacity: GB of the card, drawn as a line.
    """
    categories = [name for name in next(iter(bars.values())) if any(bar.get(name, 0) > 0.005 for bar in bars.values())]
    with style():
        drawing = blank(_WIDTH, 0.9 + 0.32 * len(bars))
        axes = drawing.figure.subplots()
        places = list(range(len(bars)))
        left = [0.0] * len(bars)
        for place, name in enumerate(categories):
            sizes = [bar.get(name, 0.0) for bar in bars.values()]
            colour, pale = PALETTE[_SHADES[place % len(_SHADES)]], place >= len(_SHADES)
            drawn = axes.barh(
                places, sizes, left=left, height=0.62, color=colour, alpha=0.45 if pale else 0.9, label=name
            )
            for patch, size in zip(drawn.patches, sizes, strict=True):
                drawing.hover(patch, [f"{name}: {size:.1f} GB"])
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        axes.axvline(capacity, color=PALETTE["ink"], linewidth=0.8, linestyle="--")
        axes.set(yticks=places, xlim=(0, 1.08 * max(capacity, *left)), xlabel="GB on the fullest GPU")
        axes.set_yticklabels(list(bars))
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.grid(axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, columnspacing=1.2, handlelength=1.0)
    return drawing


def save_png(bars: Mapping[str, Mapping[str, float]], capacity: float, path: Path) -> None:
    """Write the chart as a PNG; arguments as `memory_chart`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing = memory_chart(bars, capacity)
    with replacing(path) as staging:
        staging.write_bytes(render(drawing, "png"))
