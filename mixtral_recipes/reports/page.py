"""RUN/report.html: one self-contained page about a run. What it says is gathered here; how it looks is templates/."""

import datetime
import re
import statistics
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.reports.charts import CHARTS, PAGE_WIDTH
from mixtral_recipes.reports.record import RunRecord, read_run
from mixtral_recipes.system.drawing import PALETTE, render
from mixtral_recipes.system.files import write_text

_SAVES_SHOWN = 12
_DATA_PLACE = re.compile(r"data\.(sources\.\d+\.)?(dataset_root|paths)(\.\w+)?")
_WORTH_SAYING = 0.02  # of a run that was spent waiting for data
_LONGEST_S = 1e12  # what a timedelta holds


def write_report_of(run_log: Any) -> None:
    """Write a run's report at its end, on the rank that writes; a failure is only reported."""
    if not run_log.is_writer:
        return
    try:
        write_report(run_log.run_dir)
    except Exception as error:  # a report must not cost anybody a run
        run_log.say(f"WARNING: no report was written ({type(error).__name__}: {error}).")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page.

    Args:
        folder: The run's folder.
        output: The file; None takes ``report.html`` in the run's folder.

    Raises:
        RecipeError: it is not a run folder.
    """
    output = output or folder / "report.html"
    write_text(output, page(read_run(folder)))
    return output


def page(run: RunRecord) -> str:
    """The report's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mixtral_recipes.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["clock"] = _clock
    last = run.starts[-1] if run.starts else {}
    return environment.get_template("report.html").render(
        name=run.folder.resolve().name,
        run=run,
        last=last,
        palette=PALETTE,
        head=head(run),
        scores=scores.table(evaluation(run).get("scores", {})),
        samples=evaluation(run).get("samples", []),
        tiles=tiles(run),
        charts=_charts(run),
        saves=run.saves[-_SAVES_SHOWN:],
        planned=run.against_plan(),
        details={"Configuration": last.get("recipe", {}), "Environment": last.get("environment", {})},
    )


def head(run: RunRecord) -> list[tuple[str, str]]:
    """What was trained, from what, on what."""
    last = run.starts[-1] if run.starts else {}
    recipe = last.get("recipe", {})
    places = [value for path, value in recipe.items() if value and _DATA_PLACE.fullmatch(path)]
    data = ", ".join(map(str, places))
    kind = str(recipe.get("data.class", "")).removesuffix("DataModule")
    scheme = recipe.get("peft.class")
    trained = f"{scheme} adapters, dim {recipe.get('peft.dim')}" if scheme else "all weights" if recipe else ""
    first = run.starts[0] if run.starts else {}
    found = [
        ("Recipe", ", ".join(filter(None, (str(run.result.get("recipe") or ""), trained)))),
        ("Model", str(first.get("restored_from") or "")),
        ("Data", f"{data} ({kind})" if data else "rajpurkar/squad" if kind == "Squad" else kind),
        ("Checkpoint", str(run.result.get("checkpoint") or "")),
        ("Exported", str(run.result.get("exported") or "")),
    ]
    return [(name, value) for name, value in found if value]


def evaluation(run: RunRecord) -> dict[str, Any]:
    """What was measured of the model after training: ``scores`` and ``samples``."""
    return scores.usable(run.result.get("evaluation"))


def tiles(run: RunRecord) -> list[tuple[str, str]]:
    """(value, what it is) of the numbers at the head of the page."""
    losses, validations = run.series("loss"), run.validation_losses()
    speed = [value for _, value in run.series("tokens_per_second")]
    tflops = [value for _, value in run.series("tflops_per_process")]
    memory = [value for _, value in run.series("memory_gb")]
    seconds = sum(value for _, value in run.series("seconds"))
    skipped = [value for _, value in run.series("skipped_steps")]
    found = [
        (f"{int(max(run.steps, default=0)):,}", "steps"),
        (f"{losses[-1][1]:.4f}" if losses else "-", "last training loss"),
        (f"{validations[-1][1]:.4f}" if validations else "-", "last validation loss"),
        (f"{statistics.median(speed):,.0f}" if speed else "-", "tokens/s (median)"),
        (f"{statistics.median(tflops):.3g}" if tflops else "-", "TFLOP/s per process"),
        (f"{max(memory):.2f} GB" if memory else "-", "memory, most"),
        (str(datetime.timedelta(seconds=round(max(0.0, min(seconds, _LONGEST_S))))), "spent in steps"),
    ]
    waited = sum(value for _, value in run.series("data_wait_seconds"))
    if seconds and waited >= _WORTH_SAYING * seconds:
        found.append((f"{waited / seconds:.0%}", "of it, waiting for data"))
    if skipped and skipped[-1]:
        found.append((f"{skipped[-1]:.0f}", "steps skipped (not finite)"))
    return found


def _charts(run: RunRecord) -> list[dict[str, Any]]:
    notes = {
        "loss": " ".join(filter(None, (_spikes(run), _sources(run)))),
        "expert_load": "Tokens that each expert received in the last logged steps, relative to an even share (1).",
        "router": f"1 means an even load. {'; '.join(_router_losses(run))}",
    }
    found = []
    for chart in CHARTS:
        drawing = chart.draw(run, PAGE_WIDTH)
        svg = render(drawing, "svg", chart.name).decode() if drawing else None
        found.append({"title": chart.title, "svg": svg, "note": notes.get(chart.name)})
    return found


def _spikes(run: RunRecord) -> str:
    spikes = sum(bool(metrics.get("loss_spike")) for metrics in run.steps.values())
    return f"{spikes} step(s) flagged as spikes." if spikes else ""


def _sources(run: RunRecord) -> str:
    last = [f"{name} {points[-1][1]:.4f}" for name, points in run.source_losses().items() if points]
    return f"Last loss by source: {', '.join(last)}." if last else ""


def _router_losses(run: RunRecord) -> list[str]:
    latest = next((m["router_losses"] for m in reversed(run.steps.values()) if m.get("router_losses")), {})
    return [f"{name} {sum(values) / len(values):.4g} (mean over layers)" for name, values in latest.items() if values]


def _clock(seconds: Any) -> str:
    return datetime.datetime.fromtimestamp(float(seconds or 0)).strftime("%Y-%m-%d %H:%M:%S")
