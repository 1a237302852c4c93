"""RUN/report.html: one self-contained page about a run. Standard library only."""

import datetime
from html import escape
from pathlib import Path
from typing import Any

from mixtral_recipes.reports.charts import Series, heat_map, line_chart, smooth
from mixtral_recipes.reports.record import RunRecord, read_run
from mixtral_recipes.system.files import write_text

_STYLE = """
:root { --bg:#f6f7f9; --card:#fff; --ink:#1c2430; --soft:#5d6b7e; --line:#e3e7ed; --a:#2463c7; --b:#c2501a;
        --more:#c2501a; --less:#2463c7; --warn:#9a3412; }
@media (prefers-color-scheme: dark) { :root { --bg:#12161c; --card:#1a2029; --ink:#e6eaf0; --soft:#98a4b5;
        --line:#2b3440; --a:#6ea8ff; --b:#ff9e66; --more:#ff9e66; --less:#6ea8ff; --warn:#ffb38a; } }
* { box-sizing: border-box } body { margin:0; background:var(--bg); color:var(--ink);
  font:15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width:1240px; margin:0 auto; padding:28px 24px 60px }
h1 { font-size:26px; margin:0 } h2 { font-size:16px; margin:0 0 10px } .sub { color:var(--soft); margin:4px 0 22px }
.warn { color:var(--warn) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin-bottom:16px }
.tile, .card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px }
.tile b { display:block; font-size:21px; font-variant-numeric:tabular-nums }
.tile span { color:var(--soft); font-size:13px }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(440px,1fr)); gap:16px }
.card { margin-bottom:16px } .charts .card { margin:0 } svg { width:100%; height:auto; display:block }
.grid { stroke:var(--line) } .tick, .axis, .cell { fill:var(--soft); font-size:12px }
.on { fill:var(--card); font-size:12px }
.cell { fill:var(--ink) }
.line { fill:none; stroke-width:1.8; stroke-linejoin:round } .line.a { stroke:var(--a) } .line.b { stroke:var(--b) }
.line.faint { stroke:var(--a); stroke-opacity:.28; stroke-width:1.2 }
.dot.a { fill:var(--a) } .dot.b { fill:var(--b) } .dot.faint { fill:var(--a) }
.more { fill:var(--more) } .less { fill:var(--less) } .none { color:var(--soft) }
table { border-collapse:collapse; width:100% } td, th { text-align:left; padding:4px 14px 4px 0; vertical-align:top;
  border-bottom:1px solid var(--line); overflow-wrap:anywhere } th { color:var(--soft); font-weight:500 }
td:first-child { white-space:nowrap } details summary { cursor:pointer; font-weight:600 }
details table { margin-top:10px; font-size:13.5px }
.note { color:var(--soft); font-size:13px; margin:8px 0 0 }
@media print { body { background:#fff } .card, .tile { break-inside:avoid } }
"""


def write_report_of(run_log: Any) -> None:
    """Write a run's report at its end, on the rank that writes; a failure to do so is said, and no more."""
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
        RecipeError: the folder is no run's.
    """
    output = output or folder / "report.html"
    write_text(output, page(read_run(folder)))
    return output


def page(run: RunRecord) -> str:
    """The report's HTML."""
    name = escape(run.folder.resolve().name)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="sub">{_headline(run)}</p>',
        _tiles(run),
        f'<div class="charts">{"".join(_charts(run))}</div><p></p>',
        _card("Starts", _starts(run)),
        _card("Checkpoints", _saves(run)),
        _details("Configuration", _latest(run, "recipe")),
        _details("Environment", _latest(run, "environment")),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _headline(run: RunRecord) -> str:
    last = run.starts[-1] if run.starts else {}
    layout = f"{last.get('world_size', '?')} process(es), {escape(str(last.get('topology', 'unknown layout')))}"
    if "error" in run.end:
        return f'{layout} · <span class="warn">ended with {escape(run.end["error"])}</span>'
    return f"{layout} · {'finished' if run.end else 'running, or killed'}"


def _tiles(run: RunRecord) -> str:
    losses, validations = run.series("loss"), run.validation_losses()
    speed = [value for _, value in run.series("tokens_per_second")]
    tflops = [value for _, value in run.series("tflops_per_process")]
    memory = [value for _, value in run.series("memory_gb")]
    seconds = sum(value for _, value in run.series("seconds"))
    skipped = [value for _, value in run.series("skipped_steps")]
    tiles = [
        (f"{int(max(run.steps, default=0)):,}", "steps"),
        (f"{losses[-1][1]:.4f}" if losses else "-", "last training loss"),
        (f"{validations[-1][1]:.4f}" if validations else "-", "last validation loss"),
        (f"{_median(speed):,.0f}" if speed else "-", "tokens/s (median)"),
        (f"{_median(tflops):.3g}" if tflops else "-", "TFLOP/s per process"),
        (f"{max(memory):.2f} GB" if memory else "-", "memory, most"),
        (str(datetime.timedelta(seconds=round(seconds))), "spent in steps"),
    ]
    if skipped and skipped[-1]:
        tiles.append((f"{skipped[-1]:.0f}", "steps skipped (not finite)"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{cells}</div>'


def _charts(run: RunRecord) -> list[str]:
    loss = [*_smoothed(run.series("loss")), Series("validation", run.validation_losses(), "b", dots=True)]
    spikes = sum(bool(metrics.get("loss_spike")) for metrics in run.steps.values())
    note = f'<p class="note">{spikes} step(s) flagged as spikes.</p>' if spikes else ""
    return [
        _card("Loss", line_chart(loss, unit="loss per token") + note),
        _card("Learning rate", line_chart([Series("learning rate", run.series("lr"))], unit="learning rate")),
        _card("Gradient norm", line_chart(_smoothed(run.series("grad_norm")), unit="norm before clipping")),
        _card("Throughput", line_chart(_smoothed(run.series("tokens_per_second")), unit="tokens per second, all")),
        _card(
            "Expert load",
            heat_map(run.expert_load(), row_name="layer", column_name="expert")
            + '<p class="note">Tokens each expert took over an even share, in the last logged steps; 1 is even.</p>',
        ),
        _card("Router", line_chart(_router(run), unit="share") + _router_note(run)),
    ]


def _smoothed(points: list[tuple[float, float]], name: str = "smoothed") -> list[Series]:
    """Points too noisy to read, faintly, under their running mean."""
    return [Series("each step", points, "faint"), Series(name, smooth(points, max(2, len(points) // 25)), "a")]


def _router(run: RunRecord) -> list[Series]:
    dropped = run.series("dropped_share")
    return [
        *_smoothed(run.series("router_entropy"), "load entropy of the worst layer, smoothed"),
        *([Series("dropped tokens", dropped, "b")] if any(value for _, value in dropped) else []),
    ]


def _router_note(run: RunRecord) -> str:
    latest = next(
        (m["router_losses"] for _, m in sorted(run.steps.items(), reverse=True) if m.get("router_losses")), {}
    )
    losses = [
        f"{escape(name)} {sum(values) / len(values):.4g} (mean over layers)"
        for name, values in latest.items()
        if values
    ]
    return f'<p class="note">1 means an even load. {"; ".join(losses)}</p>'


def _starts(run: RunRecord) -> str:
    rows = [
        (
            _time(start.get("time")),
            f"step {start.get('step', 0)}",
            f"from {start.get('restored_from', 'unknown')}",
            f"{start.get('world_size', '?')} process(es), {start.get('topology', '')}",
            "; ".join(start.get("changed", [])) or "nothing changed",
        )
        for start in run.starts
    ]
    return _table(("when", "at", "restored", "layout", "changed since"), rows)


def _saves(run: RunRecord) -> str:
    if not run.saves:
        return '<p class="none">None was written.</p>'
    rows = [(_time(s.get("time")), f"step {s['step']}", f"{s['stall_seconds']:.3f} s") for s in run.saves[-12:]]
    more = f'<p class="note">The last 12 of {len(run.saves)}.</p>' if len(run.saves) > 12 else ""
    return _table(("when", "at", "training waited"), rows) + more


def _latest(run: RunRecord, key: str) -> dict[str, Any]:
    return run.starts[-1].get(key, {}) if run.starts else {}


def _details(title: str, table: dict[str, Any]) -> str:
    rows = _table((), [(key, str(value)) for key, value in table.items()])
    return _card("", f"<details{' open' if len(table) < 12 else ''}><summary>{escape(title)}</summary>{rows}</details>")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    heads = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{heads}{body}</table>"


def _card(title: str, body: str) -> str:
    return f'<section class="card">{f"<h2>{escape(title)}</h2>" if title else ""}{body}</section>'


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _time(seconds: Any) -> str:
    return datetime.datetime.fromtimestamp(float(seconds or 0)).strftime("%Y-%m-%d %H:%M:%S")
