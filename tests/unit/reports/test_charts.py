"""The charts: which numbers they show, which way up, in which colours; the SVG and the PNG of each."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from mixtral_recipes.reports.charts import CHARTS, Series, lines, load_map, number, smooth, thin, write_pngs
from mixtral_recipes.reports.record import RunRecord, read_run
from mixtral_recipes.system.drawing import PALETTE, Drawing, render

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(write_run: Callable[..., Path], tmp_path: Path) -> RunRecord:
    return read_run(write_run(tmp_path / "run"))


def drawn(name: str, run: RunRecord) -> Drawing:
    drawing = next(chart for chart in CHARTS if chart.name == name).draw(run, 4.0)
    assert drawing is not None
    return drawing


def curves(drawing: Drawing) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of each line of a figure's first axes."""
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in drawing.figure.axes[0].get_lines()}


def svg_curve(drawing: Drawing, colour: str) -> list[tuple[float, float]]:
    """Places of the first full line of a colour in the SVG, downwards as SVG counts."""
    for path in ElementTree.fromstring(render(drawing, "svg", "x")).iter(f"{SVG}path"):
        if f"stroke: var(--{colour})" in path.get("style", "") and "L" in path.get("d", ""):
            return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))]
    raise AssertionError(f"no line of colour {colour}")


def pixels(data: bytes) -> np.ndarray:
    return np.rint(255 * imread(io.BytesIO(data))[..., :3]).astype(int)


def rgb(name: str) -> np.ndarray:
    return np.array([int(PALETTE[name][i : i + 2], 16) for i in (1, 3, 5)])


def png_curve(drawing: Drawing, colour: str) -> list[tuple[float, float]]:
    """(column, mean row) of a colour's pixels in the PNG's data area."""
    image = pixels(render(drawing, "png"))
    box = drawing.figure.axes[0].get_window_extent()  # in pixels of the figure's own resolution, upwards
    scale = image.shape[0] / drawing.figure.bbox.height
    top, bottom = int(image.shape[0] - box.y1 * scale), int(image.shape[0] - box.y0 * scale)
    hit = np.abs(image[top:bottom] - rgb(colour)).sum(-1) < 40
    return [(x, float(np.nonzero(hit[:, x])[0].mean())) for x in range(hit.shape[1]) if hit[:, x].any()]


def test_each_chart_shows_its_own_numbers(run: RunRecord) -> None:
    losses = run.series("loss")
    assert curves(drawn("loss", run)) == {
        "each step": losses,
        "smoothed": smooth(losses, 2),
        "validation": [(10, 1.0), (20, 0.5), (30, 10 / 30)],
    }
    steps = range(1, 31)
    assert curves(drawn("learning_rate", run)) == {"learning rate": [(s, 1e-3 * s) for s in steps]}
    assert curves(drawn("gradient_norm", run))["each step"] == [(s, 1.0 + s / 100) for s in steps]
    assert curves(drawn("throughput", run))["each step"] == [(s, 1e4 + s**2) for s in steps]
    entropy = curves(drawn("router", run))
    assert entropy["each step"] == [(s, 0.9 - s / 1000) for s in steps]
    assert "dropped tokens" not in entropy
    for metrics in run.steps.values():
        metrics["dropped_share"] = 0.25
    assert curves(drawn("router", run))["dropped tokens"] == [(s, 0.25) for s in steps]


def test_smoothed_lines_differ_from_the_steps(run: RunRecord) -> None:
    for step, metrics in run.steps.items():
        metrics |= {"loss": step % 2, "grad_norm": step % 2, "tokens_per_second": step % 2, "router_entropy": step % 2}
    for name in ("loss", "gradient_norm", "throughput", "router"):
        each, smoothed = list(curves(drawn(name, run)).values())[:2]
        assert [y for _, y in each] == [1, 0] * 15, name
        assert all(0.3 < y < 0.7 for _, y in smoothed[1:-1]), name


@pytest.mark.parametrize("find", [svg_curve, png_curve])
def test_more_is_higher_and_later_is_further_right(find: Callable[[Drawing, str], list[Any]]) -> None:
    points = [(1.0, 4.0), (2.0, 3.0), (3.0, 2.0), (4.0, 2.0)]
    drawing = lines([Series("falling", points)], 4.0, unit="loss")
    assert drawing is not None
    places = find(drawing, "a")
    xs, ys = [x for x, _ in places], [y for _, y in places]
    assert xs == sorted(xs)
    assert ys[0] < ys[-1], "a larger value is drawn lower"
    # The fall takes the first two thirds of the way, evenly; rows count downwards.
    share = [(y - ys[0]) / (ys[-1] - ys[0]) for y in ys]
    expected = [min(1.0, 1.5 * (x - xs[0]) / (xs[-1] - xs[0])) for x in xs]
    assert share == pytest.approx(expected, abs=0.03)


def test_the_loss_of_a_run_falls_in_both_files(run: RunRecord) -> None:
    drawing = drawn("loss", run)
    for find in (svg_curve, png_curve):
        places = find(drawing, "b")  # validation: 1.0, 0.5, 0.33
        assert places[0][1] < places[-1][1]


def test_pngs_are_the_charts(run: RunRecord) -> None:
    written = {path.stem: path for path in write_pngs(run.folder)}
    assert list(written) == ["loss", "learning_rate", "gradient_norm", "throughput", "expert_load", "router"]
    for chart in CHARTS:
        drawing = chart.draw(run, 3.4)
        assert drawing is not None
        np.testing.assert_array_equal(pixels(written[chart.name].read_bytes()), pixels(render(drawing, "png")))


LOADS = [[0.0, 2.5], [1.0, 1.5], [0.5, 1.0]]


def cells(rows: Sequence[Sequence[float]]) -> tuple[Drawing, dict[str, tuple[str, float, float, float]]]:
    """Title -> (style, left, top, height) of each cell in the SVG."""
    drawing = load_map(rows, 4.0)
    assert drawing is not None
    found = {}
    for group in ElementTree.fromstring(render(drawing, "svg", "x")).iter(f"{SVG}g"):
        title, path = group.find(f"{SVG}title"), group.find(f"{SVG}path")
        if title is not None and path is not None:
            corners = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", ""))]
            left, top = min(x for x, _ in corners), min(y for _, y in corners)
            found[title.text] = (path.get("style", ""), left, top, max(y for _, y in corners) - top)
    return drawing, found


def test_load_map_colours_say_more_and_less() -> None:
    _, found = cells(LOADS)
    styles = {title: cell[0] for title, cell in found.items()}
    assert styles == {
        "layer 0, expert 0: 0.00x an even share": "fill: var(--a); opacity: 0.94",
        "layer 0, expert 1: 2.50x an even share": "fill: var(--b); opacity: 0.94",
        "layer 1, expert 0: 1.00x an even share": "fill: var(--b); opacity: 0.06",
        "layer 1, expert 1: 1.50x an even share": "fill: var(--b); opacity: 0.5",
        "layer 2, expert 0: 0.50x an even share": "fill: var(--a); opacity: 0.5",
        "layer 2, expert 1: 1.00x an even share": "fill: var(--b); opacity: 0.06",
    }


def test_load_map_lays_out_layers_downwards_and_experts_to_the_right() -> None:
    _, found = cells(LOADS)
    left = {title[:17]: cell[1] for title, cell in found.items()}
    top = {title[:17]: cell[2] for title, cell in found.items()}
    assert left["layer 0, expert 0"] == left["layer 2, expert 0"] < left["layer 0, expert 1"]
    assert top["layer 0, expert 0"] < top["layer 1, expert 0"] < top["layer 2, expert 0"]
    assert top["layer 1, expert 0"] == top["layer 1, expert 1"]


def test_load_map_pixels() -> None:
    drawing, found = cells(LOADS)
    image = pixels(render(drawing, "png"))
    scale = image.shape[1] / (4.0 * 72)  # an SVG counts points

    def colour(title: str) -> np.ndarray:
        _, left, top, height = found[title + "x an even share"]
        return image[int((top + height / 2) * scale), int((left + 2) * scale)]

    def blend(name: str, opacity: float) -> np.ndarray:
        return opacity * rgb(name) + (1 - opacity) * 255

    np.testing.assert_allclose(colour("layer 0, expert 0: 0.00"), blend("a", 0.94), atol=2)
    np.testing.assert_allclose(colour("layer 0, expert 1: 2.50"), blend("b", 0.94), atol=2)
    np.testing.assert_allclose(colour("layer 1, expert 1: 1.50"), blend("b", 0.5), atol=2)
    np.testing.assert_allclose(colour("layer 2, expert 0: 0.50"), blend("a", 0.5), atol=2)
    np.testing.assert_allclose(colour("layer 2, expert 1: 1.00"), blend("b", 0.06), atol=2)


def test_load_map_key_is_coloured_as_the_cells_are() -> None:
    drawing, _ = cells(LOADS)
    _, key = drawing.figure.axes
    colours = [(patch.get_y(), PALETTE["b"] == _hex(patch), patch.get_alpha()) for patch in key.patches]
    assert [(more, round(alpha, 2)) for _, more, alpha in sorted(colours)] == [
        (False, 0.94), (False, 0.5), (True, 0.06), (True, 0.5), (True, 0.94),
    ]  # fmt: skip
    assert [label.get_text() for label in key.get_yticklabels()] == ["0", "0.5", "1", "1.5", "2+"]


def _hex(patch: Any) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in patch.get_facecolor()[:3])


def test_the_expert_load_chart_is_the_runs(run: RunRecord) -> None:
    drawing = drawn("expert_load", run)
    assert [titles[0] for titles in drawing.titles.values()] == [
        "layer 0, expert 0: 0.50x an even share", "layer 0, expert 1: 1.50x an even share",
        "layer 1, expert 0: 1.00x an even share", "layer 1, expert 1: 1.00x an even share",
    ]  # fmt: skip


def test_validation_points_say_their_numbers_under_the_pointer(run: RunRecord) -> None:
    svg = ElementTree.fromstring(render(drawn("loss", run), "svg", "x"))
    titles = [use.findtext(f"{SVG}title") for use in svg.iter(f"{SVG}use")]
    assert titles[:3] == ["step 10: 1", "step 20: 0.5", "step 30: 0.33333"]


def test_svg_leaves_font_and_colours_to_the_page(run: RunRecord) -> None:
    for chart in CHARTS:
        svg = render(drawn(chart.name, run), "svg", chart.name).decode()
        assert re.search(r"(fill|stroke): var\(--(soft|ink)\)", svg)
        assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<image", svg), chart.name
        assert "<text" in svg
        turned = [element for element in ElementTree.fromstring(svg).iter() if "transform" in element.attrib]
        assert {element.tag for element in turned} == {f"{SVG}text"}, "a drawing is turned or flipped as a whole"
        references = set(re.findall(r"#([\w-]+)", svg))
        assert references <= set(re.findall(r'id="([^"]+)"', svg))
        assert all(reference.startswith(f"{chart.name}-") for reference in references)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1500, "1500"), (12000, "12k"), (2.5e6, "2.5M"), (3e-4, "3e-4")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_thinning_keeps_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[1234] = (1234.0, -50.0)
    found = thin(points)
    assert len(found) <= 800
    assert {(4321.0, 50.0), (1234.0, -50.0)} <= set(found)
    drawing = lines([Series("x", points)], 4.0, unit="u")
    assert drawing is not None
    assert curves(drawing)["x"] == found


def test_smoothing_has_no_lag() -> None:
    assert smooth([], 10) == []
    assert smooth([(1, 4.0), (2, math.nan), (3, 4.0)], 10) == [(1, 4.0), (3, 4.0)]
    line = [(float(x), 2.0 * x) for x in range(50)]
    assert smooth(line, 7) == line
    assert smooth([(1, 0.0), (2, 3.0), (3, 6.0), (4, 0.0)], 3) == [(1, 0.0), (2, 3.0), (3, 3.0), (4, 0.0)]


def test_smoothing_a_long_line_takes_as_many_neighbours_for_fewer_points() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    found = smooth(points, 400)
    assert 700 <= len(found) <= 800
    assert found[0] == points[0]
    assert found[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for x, y in found if 200 <= x < 9800)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [1e-30, 1e30], [0.0, 0.0, 0.0], [-1e9, 1e9]])
def test_charts_of_odd_data(values: list[float]) -> None:
    drawing = lines([Series("x", list(enumerate(values))), Series("none", [])], 4.0, unit="u")
    assert drawing is not None
    assert list(curves(drawing)) == ["x"]
    assert ("<use" in render(drawing, "svg", "x").decode()) == (len(values) == 1), "a single point is marked"


def test_charts_of_nothing() -> None:
    assert lines([Series("x", [(1, math.nan)])], 4.0, unit="u") is None
    assert load_map([], 4.0) is None
    assert load_map([[]], 4.0) is None
