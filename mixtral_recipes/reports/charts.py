"""A run's charts, each described and drawn once: as SVG for the page, as PNG for papers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.reports.record import RunRecord, read_run
from mixtral_recipes.system.drawing import PALETTE, Drawing, blank, render, style
from mixtral_recipes.system.files import replacing

Point = tuple[float, float]

PAGE_WIDTH, COLUMN_WIDTH = 4.4, 3.4  # inches: half of the page, one column of a paper
_MOST_POINTS = 800


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: (step, value), by step.
        colour: Name in the palette.
        faint: Whether it is drawn faintly, behind the main line.
        dots: Whether each point is marked.
    """

    name: str
    points: Sequence[Point]
    colour: str = "a"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Of its file, without the suffix.
        title: On the page.
        draw: From a run and a width in inches to a drawing; None if the run recorded nothing for it.
    """

    name: str
    title: str
    draw: Callable[[RunRecord, float], Drawing | None]


def write_pngs(folder: Path) -> list[Path]:
    """Write every chart that has data as a PNG into ``figures``: loss.png, expert_load.png and so on.

    Args:
        folder: The run's folder.

    Raises:
        RecipeError: it is not a run folder.
    """
    run = read_run(folder)
    output = folder / "figures"
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in CHARTS:
        drawing = chart.draw(run, COLUMN_WIDTH)
        if drawing:
            written.append(output / f"{chart.name}.png")
            with replacing(written[-1]) as staging:
                staging.write_bytes(render(drawing, "png"))
    return written


def lines(series: Sequence[Series], width: float, *, unit: str) -> Drawing | None:
    """Lines over steps.

    Args:
        series: What to draw; those without points are left out.
        width: Inches.
        unit: Along the vertical axis.
    """
    drawn = [(s, thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    drawn = [(s, points) for s, points in drawn if points]
    if not drawn:
        return None
    with style():
        drawing = blank(width, 0.56 * width)
        axes = drawing.figure.subplots()
        for s, points in drawn:
            dots = s.dots or len(points) == 1
            look = {"alpha": 0.3, "linewidth": 0.8} if s.faint else {}
            xs, ys = zip(*points, strict=True)
            (line,) = axes.plot(xs, ys, color=PALETTE[s.colour], label=s.name, **look)
            if dots:
                line.set(marker="o", clip_on=False)
                drawing.hover(line, [f"step {x:g}: {y:.5g}" for x, y in points])
        _steps_axis(axes, [x for _, points in drawn for x, _ in points])
        axes.margins(y=0.06)
        axes.yaxis.set_major_locator(_round_ticks(6))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.grid(axis="y")
        axes.set_ylabel(unit)
        if len(drawn) > 1:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=len(drawn), borderpad=0, columnspacing=1.2,
                handlelength=1.4,
            )  # fmt: skip
    return drawing


def load_map(rows: Sequence[Sequence[float]], width: float) -> Drawing | None:
    """Load of layers' experts as coloured cells: an even share is neutral, more is one colour, less another.

    Args:
        rows: Of each layer, the first at the top, each expert's load over an even share.
        width: Inches.
    """
    if not rows or not rows[0]:
        return None
    cell_height = width * max(14.0, min(34.0, 420 / len(rows))) / 560
    with style():
        drawing = blank(width, len(rows) * cell_height + 0.4)
        axes, key_axes = drawing.figure.subplots(1, 2, width_ratios=[24, 1])
        numbers = cell_height >= width * 16 / 560 and len(rows[0]) <= 14
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                cell = _cell(axes, column, row, value, f"{value:.2f}" if numbers else "")
                title = f"layer {row}, expert {column}: {value:.2f}x an even share"
                drawing.hover(cell, [title])
        axes.set(xlim=(-0.5, len(rows[0]) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="expert", ylabel="layer")
        axes.xaxis.set(major_locator=_round_ticks(16, whole=True), label_position="top", ticks_position="top")
        axes.yaxis.set_major_locator(_round_ticks(16, whole=True))
        for place, value in enumerate((0, 0.5, 1, 1.5, 2)):
            _cell(key_axes, 0, place, value, "")
        key_axes.set_box_aspect(5)
        key_axes.set_anchor("N")
        key_axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, 4.5), xticks=[], yticks=range(5), ylabel="over an even share")
        key_axes.set_yticklabels(["0", "0.5", "1", "1.5", "2+"])
        key_axes.yaxis.set(label_position="right", ticks_position="right")
        for both in (axes, key_axes):
            both.spines[:].set_visible(False)
    return drawing


def _cell(axes: Any, column: int, row: int, value: float, text: str) -> Any:
    from matplotlib.patches import Rectangle

    # Twice an even share, or none at all, is the full colour.
    strength = min(1.0, abs(value - 1.0))
    cell = Rectangle(
        (column - 0.47, row - 0.46), 0.94, 0.92, color=PALETTE["b" if value >= 1.0 else "a"],
        alpha=0.06 + 0.88 * strength,
    )  # fmt: skip
    axes.add_patch(cell)
    if text:
        colour = PALETTE["card" if strength > 0.7 else "ink"]
        axes.text(column, row, text, ha="center", va="center_baseline", color=colour).set_in_layout(False)
    return cell


def _steps_axis(axes: Any, steps: Sequence[float]) -> None:
    low, high = min(steps), max(steps)
    axes.set_xlim((low, high) if low < high else (low - 1, high + 1))
    axes.xaxis.set_major_locator(_round_ticks(6, whole=True))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel("step")


def _round_ticks(most: int, *, whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole)


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """Each point's mean with its ``width`` neighbours, as many before as behind, so that it does not lag.

    Near the ends there are fewer; values that are not finite are left out. A long line gets only as many points as a
    chart shows.
    """
    finite = [p for p in points if math.isfinite(p[1])]
    values = [y for _, y in finite]
    last = len(finite) - 1
    apart = math.ceil(len(finite) / (_MOST_POINTS - 1)) or 1
    found: list[Point] = []
    for place in sorted({*range(0, len(finite), apart), max(last, 0)} if finite else ()):
        reach = min(width // 2, place, last - place)
        around = values[place - reach : place + reach + 1]
        found.append((finite[place][0], sum(around) / len(around)))
    return found


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Fewer points that look the same: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    found: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def number(value: float) -> str:
    """A tick's label: short, without exponents where it can be."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{float(f'{value:.4g}'):g}"


def _smoothed(points: list[Point], name: str = "smoothed") -> list[Series]:
    """Points too noisy to read, faintly, under their running mean."""
    return [Series("each step", points, faint=True), Series(name, smooth(points, max(2, len(points) // 25)))]


def _loss(run: RunRecord, width: float) -> Drawing | None:
    validation = Series("validation", run.validation_losses(), "b", dots=True)
    of_sources = [
        Series(name, smooth(points, max(2, len(points) // 25)), "ab"[number % 2], faint=True)
        for number, (name, points) in enumerate(run.source_losses().items())
    ]
    return lines([*_smoothed(run.series("loss")), *of_sources, validation], width, unit="loss per token")


def _learning_rate(run: RunRecord, width: float) -> Drawing | None:
    return lines([Series("learning rate", run.series("lr"))], width, unit="learning rate")


def _gradient_norm(run: RunRecord, width: float) -> Drawing | None:
    return lines(_smoothed(run.series("grad_norm")), width, unit="norm before clipping")


def _throughput(run: RunRecord, width: float) -> Drawing | None:
    return lines(_smoothed(run.series("tokens_per_second")), width, unit="tokens per second, all")


def _expert_load(run: RunRecord, width: float) -> Drawing | None:
    return load_map(run.expert_load(), width)


def _router(run: RunRecord, width: float) -> Drawing | None:
    entropy = _smoothed(run.series("router_entropy"), "load entropy of the worst layer, smoothed")
    dropped = run.series("dropped_share")
    more = [Series("dropped tokens", dropped, "b")] if any(value for _, value in dropped) else []
    return lines([*entropy, *more], width, unit="share")


CHARTS = (
    Chart("loss", "Loss", _loss),
    Chart("learning_rate", "Learning rate", _learning_rate),
    Chart("gradient_norm", "Gradient norm", _gradient_norm),
    Chart("throughput", "Throughput", _throughput),
    Chart("expert_load", "Expert load", _expert_load),
    Chart("router", "Router", _router),
)
