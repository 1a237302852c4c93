"""The record of a run, its charts and its page."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.reports.charts import Series, heat_map, line_chart, number, smooth, thin, ticks
from mixtral_recipes.reports.page import write_report
from mixtral_recipes.reports.record import read_run


def write_run(folder: Path, steps: int = 30) -> Path:
    """A run's metrics.jsonl as the loop writes it: two starts, a step made twice, a line cut off."""
    start = {"kind": "start", "time": 1.7e9, "step": 0, "restored_from": "random weights", "changed": [],
             "topology": "EP2",
             "world_size": 2, "environment": {"torch": "2"}, "recipe": {"optim.lr": 1e-3}}  # fmt: skip
    entries: list[dict[str, Any]] = [start]
    for step in [*range(1, 11), *range(9, steps + 1)]:
        entry: dict[str, Any] = {
            "kind": "train", "time": 1.7e9 + step, "step": step, "loss": 5 / step, "grad_norm": 1.0, "lr": 1e-3,
            "seconds": 0.5, "tokens_per_second": 1e4, "tflops_per_process": 0.01, "memory_gb": 1.5, "skipped_steps": 0,
            "router_entropy": 0.9, "dropped_share": 0.0,
        }  # fmt: skip
        if step == 10:
            entry |= {"loss": "nan", "loss_spike": True}
        if step % 5 == 0:
            entry |= {"expert_load": [[10, 30], [20, 20]], "router_losses": {"load_balancing_loss": [1.0, 1.2]}}
        entries.append(entry)
    entries += [{"kind": "val", "step": steps, "val_loss": 1.0}, {"kind": "save", "step": 9, "stall_seconds": 0.1}]
    entries.append(start | {"step": 8, "changed": ["optim.lr: 1 -> <b>2</b>"]})
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, entries)) + '\n{"kind": "train", "step": 99, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_step_made_twice_counts_once_and_a_cut_line_not_at_all(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert sorted(run.steps) == list(range(1, 31))
    assert len(run.series("loss")) == 29, "the step that was not finite is left out"
    assert run.expert_load() == [[0.5, 1.5], [1.0, 1.0]]
    assert len(run.starts) == 2


def test_page_is_one_file_and_says_what_happened(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run & more")).read_text()
    assert not re.search(r"(src|href)=", page), "the page loads something"
    assert "<title>run &amp; more</title>" in page
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "<b>2</b>" not in page
    for text in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Expert load", "Configuration", "optim.lr",
                 "Environment", "random weights", "1 step(s) flagged as spikes", "0:00:15"):  # fmt: skip
        assert text in page, text
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_page_of_a_run_that_recorded_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Nothing recorded" in write_report(tmp_path).read_text()
    with pytest.raises(RecipeError, match="is no run folder"):
        write_report(tmp_path / "absent")


def test_command_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys; from mixtral_recipes.cli.report import command; "
        f"command(run={str(tmp_path / 'run')!r}, json=True); "
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(out)["files"] == [str(tmp_path / "run" / "report.html")]


def test_pngs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from mixtral_recipes.reports.png import write_pngs

    for path in write_pngs(write_run(tmp_path / "run")):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1234), (0.00012, 0.00019), (5, 5), (1e7, 3e9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high) for value in found)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1500, "1500"), (12000, "12k"), (2.5e6, "2.5M"), (3e-4, "3e-4")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_thinning_keeps_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 50.0)
    found = thin(points)
    assert len(found) <= 800
    assert (4321.0, 50.0) in found


def test_smoothing_has_no_lag() -> None:
    assert smooth([(1, 4.0), (2, math.nan), (3, 4.0)], 10) == [(1, 4.0), (3, 4.0)]
    line = [(float(x), 2.0 * x) for x in range(50)]
    assert smooth(line, 7) == line


def test_charts_of_odd_data() -> None:
    assert "Nothing" in line_chart([Series("x", [(1, math.nan)])], unit="u")
    assert "<circle" in line_chart([Series("x", [(1, 2.0)])], unit="u")
    assert "<polyline" in line_chart([Series("x", [(1, 2.0), (2, 2.0)])], unit="u", log=True)
    assert heat_map([], row_name="layer", column_name="expert").startswith("<p")
