"""Charts as SVG text, for a page that needs nothing else. Standard library only, so that a run's end does not wait.

Colours come from the page's CSS variables, so that charts follow its light or dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 40
_MOST_POINTS = 800


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: (step, value), by step.
        css: Class of its line: ``a``, ``b`` or ``faint``.
        dots: Whether each point is marked.
    """

    name: str
    points: Sequence[Point]
    css: str = "a"
    dots: bool = False


def line_chart(series: Sequence[Series], *, unit: str, log: bool = False) -> str:
    """Lines over steps.

    Args:
        series: What to draw; those without points are left out.
        unit: Under the vertical axis.
        log: Whether the vertical axis is logarithmic.

    Returns:
        An ``<svg>`` element, or a sentence when there is nothing to draw.
    """
    drawn = [Series(s.name, thin([p for p in s.points if _drawable(p[1], log)]), s.css, s.dots) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return '<p class="none">Nothing recorded.</p>'
    xs = [x for s in drawn for x, _ in s.points]
    ys = [math.log10(y) if log else y for s in drawn for _, y in s.points]
    x_axis, y_axis = _Axis.around(xs, _LEFT, WIDTH - _RIGHT, whole=True), _Axis.around(ys, HEIGHT - _BOTTOM, _TOP)
    body = [_grid(x_axis, y_axis, log, unit)]
    for s in drawn:
        places = [(x_axis.at(x), y_axis.at(math.log10(y) if log else y)) for x, y in s.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(places) > 1:
            body.append(f'<polyline class="line {s.css}" points="{path}"/>')
        if s.dots or len(places) == 1:
            for (x, y), (step, value) in zip(places, s.points, strict=True):
                title = f"<title>step {step:g}: {value:.5g}</title>"
                body.append(f'<circle class="dot {s.css}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
    if len(drawn) > 1:
        body.append(_legend(drawn))
    return _svg(WIDTH, HEIGHT, body)


def heat_map(rows: Sequence[Sequence[float]], *, row_name: str, column_name: str) -> str:
    """Numbers around 1.0 as coloured cells: even is neutral, more is one colour, less another.

    Args:
        rows: One list per row.
        row_name: What a row is ("layer").
        column_name: What a column is ("expert").
    """
    if not rows or not rows[0]:
        return '<p class="none">Nothing recorded.</p>'
    columns = len(rows[0])
    left, top = 62, 34
    cell_w = (WIDTH - left - _RIGHT) / columns
    cell_h = max(14.0, min(34.0, 420 / len(rows)))
    body = [_text("axis", left + (WIDTH - left - _RIGHT) / 2, 12, column_name)]
    body += [_text("tick", left + (column + 0.5) * cell_w, 28, str(column)) for column in range(columns)]
    for row, values in enumerate(rows):
        y = top + row * cell_h
        if cell_h >= 16 or row % 4 == 0:
            body.append(_text("tick", left - 8, y + cell_h / 2 + 4, str(row) if row else f"{row_name} 0", "end"))
        for column, value in enumerate(values):
            title = f"{row_name} {row}, {column_name} {column}: {value:.2f}x an even share"
            body.append(_cell(value, left + column * cell_w, y, cell_w, cell_h, title))
    return _svg(WIDTH, top + len(rows) * cell_h + 6, body)


def _cell(value: float, x: float, y: float, width: float, height: float, title: str) -> str:
    # Twice an even share, or none at all, is the full colour.
    strength = min(1.0, abs(value - 1.0))
    rect = (
        f'<rect class="{"more" if value >= 1.0 else "less"}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" '
        f'height="{height - 2:.1f}" rx="2" fill-opacity="{0.06 + 0.88 * strength:.2f}"><title>{title}</title></rect>'
    )
    if height < 16 or width < 34:
        return rect
    return rect + _text("on" if strength > 0.6 else "cell", x + width / 2, y + height / 2 + 4, f"{value:.2f}")


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """Each point's mean with its ``width`` neighbours, as many before as behind, so that it does not lag.

    Near the ends there are fewer; what is not finite is left out.
    """
    finite = [p for p in points if math.isfinite(p[1])]
    found: list[Point] = []
    for place, (x, _) in enumerate(finite):
        reach = min(width // 2, place, len(finite) - 1 - place)
        around = finite[place - reach : place + reach + 1]
        found.append((x, sum(y for _, y in around) / len(around)))
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


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Round numbers between two values: at most ``most``, 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    apart = next((m * power for m in (1, 2, 5, 10) if span / (m * power) <= most), 10 * power)
    apart = max(1.0, apart) if whole else apart
    first = math.ceil(low / apart - 1e-9)
    return [n * apart for n in range(first, math.floor(high / apart + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    whole: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, whole: bool = False) -> "_Axis":
        low, high = min(values), max(values)
        margin = 0.0 if whole else 0.06 * ((high - low) or abs(high) or 1.0)
        if whole and low == high:
            low, high = low - 1, high + 1
        return cls(low - margin, high + margin, start, end, whole)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, whole=self.whole)


def _grid(x_axis: _Axis, y_axis: _Axis, log: bool, unit: str) -> str:
    parts = []
    for y in y_axis.ticks():
        place = y_axis.at(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text("tick", _LEFT - 8, place + 4, number(10**y if log else y), "end"))
    parts += [_text("tick", x_axis.at(x), HEIGHT - _BOTTOM + 18, number(x)) for x in x_axis.ticks()]
    parts.append(_text("axis", (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, "step"))
    turned = f"translate(12 {(HEIGHT - _BOTTOM) / 2}) rotate(-90)"
    parts.append(f'<text class="axis" transform="{turned}" text-anchor="middle">{escape(unit)}</text>')
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], WIDTH - _RIGHT
    for s in reversed(series):
        x -= 7 * len(s.name) + 30
        parts.append(f'<line class="line {s.css}" x1="{x}" x2="{x + 16}" y1="{_TOP + 2}" y2="{_TOP + 2}"/>')
        parts.append(_text("tick", x + 21, _TOP + 6, s.name, "start"))
    return "".join(parts)


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


def _text(css: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, body: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(body)}</svg>'


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)
