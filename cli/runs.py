"""mixtral-recipes runs: list, status, logs, cancel, resume. Imports neither torch nor nemo_run, except to resume."""

import json
import time
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Runs started from this machine, local and Slurm.")

_Id = Annotated[str, typer.Argument(help="Run id, Slurm job id, or run name (the newest of that name).")]
_Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]


@app.command("list")
def list_runs(
    everything: Annotated[bool, typer.Option("--all", help="Also runs that ended more than a week ago.")] = False,
    as_json: _Json = False,
) -> None:
    """List runs, newest first."""
    from mixtral_recipes.executors.runs import records
    from mixtral_recipes.executors.runs import states as runs

    known = records.all_records()
    if not everything:
        known = [record for record in known if time.time() - record.created < 7 * 86400]
    states = runs.states(known)
    rows = [runs.summary(record, states[record.id]) for record in known]
    if as_json:
        print(json.dumps({"runs": rows}))
        return
    if not rows:
        print("no runs" if everything else "no runs in the last week (--all shows older ones)")
        return
    table = [("ID", "STATE", "EXECUTOR", "JOB", "STARTED", "FOLDER")]
    for row in rows:
        started = time.strftime("%m-%d %H:%M", time.localtime(row["created"]))
        table.append((row["id"], row["state"], row["executor"], row.get("job_id", ""), started, row["run_dir"]))
    _print_table(table)


@app.command()
def status(run_id: _Id, as_json: _Json = False) -> None:
    """Tell how one run is doing."""
    from mixtral_recipes.executors.runs import logs, records
    from mixtral_recipes.executors.runs import states as runs

    record = records.find(run_id)
    runs.fetch(record)
    described = runs.summary(record, runs.state(record))
    failed = logs.failure(record) if described["state"] == "failed" else []
    described["error"] = failed[0] if failed else ""
    described["result"] = records.result(record.run_dir) if described["state"] == "succeeded" else None
    if as_json:
        print(json.dumps(described))
        return
    if described["error"]:
        print(described["error"])
    for key, value in described.items():
        if value not in ("", None, []) and key not in ("error", "result"):
            print(f"{key + ':':14} {_text(key, value)}")
    for key, value in (described["result"] or {}).items():
        print(f"  {key + ':':30} {value}")


@app.command()
def logs(
    run_id: _Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(help="Only this rank's lines.", min=0)] = None,
) -> None:
    """Print a run's logs, every attempt of it; after a failure the failed rank's error comes first."""
    from mixtral_recipes.executors.runs import logs as files
    from mixtral_recipes.executors.runs import records
    from mixtral_recipes.executors.runs import states as runs
    from mixtral_recipes.executors.slurm.status import FINAL

    record = records.find(run_id)
    runs.fetch(record)
    state = runs.state(record).state
    if not follow:
        for line in files.failure(record) if state == "failed" else ():
            print(line)
        for line in files.lines(record, rank):
            print(line)
        return
    asked = time.monotonic()

    def has_ended() -> bool:
        nonlocal asked, state
        if time.monotonic() - asked > 1:
            runs.fetch(record)
            state, asked = runs.state(record).state, time.monotonic()
        return state in FINAL

    for line in files.follow(record, rank or 0, has_ended):
        print(line, flush=True)
    for line in files.failure(record) if state == "failed" else ():
        print(line)


@app.command()
def cancel(run_id: _Id, as_json: _Json = False) -> None:
    """Stop a run; its ranks are asked to save first."""
    from mixtral_recipes.executors.runs import records
    from mixtral_recipes.executors.runs import states as runs

    record = records.find(run_id)
    runs.cancel(record)
    if as_json:
        print(json.dumps({"run": record.id, "cancelled": True}))
    else:
        print(f"asked {record.id} to stop")


@app.command()
def resume(run_id: _Id, as_json: _Json = False) -> None:
    """Start a run that ended again, in the same folder; it goes on from its last checkpoint."""
    from mixtral_recipes.executors.runs import records
    from mixtral_recipes.executors.runs import states as runs

    record = records.find(run_id)
    if record.executor == "slurm":
        described: dict[str, Any] = {"run": record.id, "job_id": runs.resubmit(record)}
    else:
        from mixtral_recipes.executors.launch import restart

        described = restart(record)
    if as_json:
        print(json.dumps(described))
    elif record.executor == "slurm":
        print(f"{record.id} is Slurm job {described['job_id']} now")


def _text(key: str, value: Any) -> str:
    return time.strftime("%F %T", time.localtime(value)) if key == "created" else str(value)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
