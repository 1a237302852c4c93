"""The page about a run, and the command that writes it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.checkpoints.lineage.told import rows
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.reports import page as page_module
from mixtral_recipes.reports.page import tiles, write_report, write_report_of
from mixtral_recipes.reports.record import RunRecord, read_run
from mixtral_recipes.system.drawing import PALETTE

Writer = Callable[..., Path]


def test_page_is_one_file_and_says_what_happened(write_run: Writer, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run & more")).read_text()
    assert not re.search(r"""(?<!xlink:)\b(src|href)=|<script|@import|url\((?!#)""", page), "the page loads something"
    assert "<title>run &amp; more</title>" in page
    for text in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Expert load", "Configuration", "optim.lr",
                 "Environment", "random weights", "1 step(s) flagged as spikes", "Starts", "Checkpoints", "0.100 s",
                 "2 process(es), EP2", "load_balancing_loss 1.1 (mean over layers)"):  # fmt: skip
        assert text in page, text
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6
    for svg in drawings:
        ElementTree.fromstring(svg)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "an id occurs twice"


def test_what_users_wrote_is_escaped(write_run: Writer, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end={"error": "RecipeError: <b>bad</b>"})
    with (folder / "metrics.jsonl").open("a") as file:
        nasty = {"topology": "<b>t", "restored_from": "<b>r", "recipe": {"<b>k": "<b>v"}, "environment": {"<b>e": 1}}
        file.write("\n" + json.dumps({"kind": "start", "step": 1} | nasty))
        file.write("\n" + json.dumps({"kind": "train", "step": 40, "router_losses": {"<b>loss": [1.0]}}))
        file.write("\n" + json.dumps({"kind": "end", "error": "<b>bad</b>"}))
    page = write_report(folder).read_text()
    for text in ("1 -&gt; &lt;b&gt;2", "&lt;b&gt;t", "&lt;b&gt;r", "&lt;b&gt;k", "&lt;b&gt;v", "&lt;b&gt;e",
                 "&lt;b&gt;loss", "ended with &lt;b&gt;bad"):  # fmt: skip
        assert text in page, text
    assert set(re.findall(r"<b>(.?)", page)) <= set("0123456789-"), "only tiles are bold"


def test_tiles(write_run: Writer, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert tiles(run) == [
        ("30", "steps"),
        ("0.1667", "last training loss"),  # 5 / 30
        ("0.3333", "last validation loss"),  # 10 / 30
        ("10,240", "tokens/s (median)"),  # 1e4 + (15^2 + 16^2) / 2, rounded to the even one
        ("16.5", "TFLOP/s per process"),  # 1 + (15 + 16) / 2
        ("1.49 GB", "memory, most"),  # the first step's
        ("0:00:15", "spent in steps"),  # 30 of half a second: those made twice count once
    ]
    for metrics in run.steps.values():
        metrics["skipped_steps"] = 3
    assert tiles(run)[-1] == ("3", "steps skipped (not finite)")
    page = page_module.page(run)
    shown = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', page)
    assert shown == tiles(run)


def test_tiles_of_a_run_that_recorded_nothing() -> None:
    assert [value for value, _ in tiles(RunRecord(Path()))] == ["0", "-", "-", "-", "-", "-", "0:00:00"]


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (None, "2 process(es), EP2 · running, or killed"),
        ({}, "2 process(es), EP2 · finished"),
        (
            {"error": "RecipeError: no room"},
            '2 process(es), EP2 · <span class="warn">ended with RecipeError: no room</span>',
        ),
    ],
)
def test_headline(end: dict[str, str] | None, text: str, write_run: Writer, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", end=end)).read_text()
    (headline,) = re.findall(r'<p class="sub">(.*?)</p>', page, re.DOTALL)
    assert " ".join(headline.split()) == text


def test_page_of_a_run_that_recorded_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    assert page.count("Nothing recorded.") == 6
    assert "None was written." in page
    with pytest.raises(RecipeError, match="is not a run folder"):
        write_report(tmp_path / "absent")


def test_the_last_checkpoints_are_listed(write_run: Writer, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(100, 120):
            file.write("\n" + json.dumps({"kind": "save", "step": step, "stall_seconds": step / 1000}))
    page = write_report(folder).read_text()
    listed = re.findall(r"<td>step (\d+)</td>\s*<td>([\d.]+) s</td>", page)
    assert listed == [(str(step), f"0.{step}") for step in range(108, 120)]
    assert "The last 12 of 21." in page


def test_the_page_knows_every_colour_in_both_themes(write_run: Writer, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text()
    dark = page[page.index("prefers-color-scheme: dark") :]
    for name, colour in PALETTE.items():
        assert f"--{name}: {colour};" in page
        assert re.search(rf"--{name}: #[0-9a-f]{{6}};", dark), name
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= {*PALETTE, "page", "warn"}


def test_a_report_that_fails_costs_no_run(tmp_path: Path) -> None:
    class Log:
        is_writer = True
        run_dir = tmp_path / "absent"
        said: list[str]

        def say(self, text: str) -> None:
            self.said = [text]

    log = Log()
    write_report_of(log)
    assert log.said[0].startswith("WARNING: no report was written (RecipeError: ")


def test_command_writes_page_and_pngs_and_loads_no_torch(write_run: Writer, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from mixtral_recipes.cli.report import command; "
        "from mixtral_recipes.system import quiet; quiet.libraries(); "
        f"command(run={str(folder)!r}, png=True, json=True); "
        "assert not {'torch', 'megatron', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    # A machine on which matplotlib never ran: its font cache is built, without a word.
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "fresh")}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    names = ["loss", "learning_rate", "gradient_norm", "throughput", "expert_load", "router"]
    expected = [folder / "report.html", *(folder / "figures" / f"{name}.png" for name in names)]
    assert json.loads(done.stdout)["files"] == [str(path) for path in expected]
    assert done.stderr == ""
    for path in expected[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_lineage_of_the_last_start(write_run: Writer, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "Lineage" not in write_report(folder).read_text()
    source = Lineage("source", Identity("a" * 64), origin={"id": "hf://org/<b>name", "revision": "abc"})
    own = Lineage("training", Identity(), run={"name": "r", "step": 0}, parents=(Parent("start", source, "/home/me"),))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"kind": "start", "step": 1, "lineage": rows(own)}))
    page = write_report(folder).read_text()
    for text in ("Lineage", "<td>run r, step 0</td>", "<td>hf://org/&lt;b&gt;name@abc</td>", "<td>aaaaaaaaaaaa</td>"):
        assert text in page, text
    assert "/home/me" not in page
