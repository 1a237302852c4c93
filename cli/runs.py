"""``mixtral-recipes runs``: list, status, logs, cancel, resume. No torch, and no nemo_run except to resume."""

import time
from typing import Annotated, Any

from mixtral_recipes.cli.options.groups import App, option
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.options.runs import Run
from mixtral_recipes.cli.output import note, print_json, print_table, say, table
from mixtral_recipes.errors import LaunchError

app = App("See, follow, resume and stop runs.")


@app.command("list")
def list_runs(
    *,
    everything: Annotated[bool, option("--all", "Also runs that ended more than a week ago.")] = False,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    from mixtral_recipes.executors.runs import records, states

    known = records.all_records()
    if not everything:
        known = [record for record in known if time.time() - record.created < 7 * 86400]
    found = states.states(known)
    rows = [states.summary(record, found[record.id]) for record in known]
    for why in dict.fromkeys(row["detail"] for row in rows if row["state"] == "unknown"):
        note(f"unknown: {why}")
    if json:
        print_json({"runs": rows})
        return
    if not rows:
        print("no runs" if everything else "no runs in the last week (--all shows older ones)")
        return
    titles = ("ID", "STATE", "EXECUTOR", "JOB", "STARTED", "FOLDER")
    shown = [
        (
            row["id"],
            row["state"],
            row["executor"],
            row.get("job_id", ""),
            time.strftime("%m-%d %H:%M", time.localtime(row["created"])),
            row["run_dir"],
        )
        for row in rows
    ]
    print_table(table(titles, shown))


@app.command()
def status(*, run: Run, json: Json = False) -> None:
    """Show how one run is doing."""
    from mixtral_recipes.executors.runs import logs, records, states

    record = records.find(run)
    states.fetch(record)
    described = states.summary(record, states.state(record))
    failed = logs.failure(record) if described["state"] == "failed" else []
    described["error"] = failed[0] if failed else ""
    described["plan"] = _plan(record.run_dir)
    described["result"] = states.result(record) if described["state"] == "succeeded" else None
    if json:
        print_json(described)
        return
    if described["error"]:
        say(described["error"])
    for key, value in described.items():
        if value not in ("", None, [], {}) and key not in ("error", "result", "plan"):
            say(f"{key + ':':14} {_text(key, value)}")
    for key, both in described["plan"].items():
        print(f"{key + ':':14} {both['measured']:.4g}, predicted {both['predicted']:.4g}")
    for key, value in (described["result"] or {}).items():
        if isinstance(value, dict | list):
            say(f"  {key + ':':30} see {record.run_dir}/result.json")
        elif value is not None:
            say(f"  {key + ':':30} {format(value, '.6g') if isinstance(value, float) else value}")


@app.command()
def logs(
    *,
    run: Run,
    follow: Annotated[bool, option("--follow -f", "Keep following until the run ends.")] = False,
    rank: Annotated[int | None, option("--rank N", "Only this rank's lines.", min=0)] = None,
) -> None:
    """Print a run's logs, every attempt; for a failed run, the failed rank's error first."""
    from mixtral_recipes.executors.runs import logs as files
    from mixtral_recipes.executors.runs import records, states

    record = records.find(run)
    last = record.nodes * record.nproc_per_node - 1
    if rank is not None and rank > last:
        raise LaunchError(f"--rank {rank}: the last rank of run {record.id} is {last}.")
    if follow:
        watched = states.Watched(record)
        for line in files.follow(record, rank or 0, watched.ended):
            say(line)
        for line in files.failure(record) if watched.state.state == "failed" else ():
            say(line)
        return
    if away := states.fetch(record):
        note(f"WARNING: showing run {record.id} as it was when last checked: {away}")
    for line in files.failure(record) if states.state(record).state == "failed" else ():
        say(line)
    for line in files.lines(record, rank):
        say(line)


@app.command()
def cancel(*, run: Run, json: Json = False) -> None:
    """Stop a run; its ranks are asked to save first."""
    from mixtral_recipes.executors.runs import records, states

    found = records.find_all(run)
    running = (record for record in found if states.state(record).state not in states.FINAL)
    record = next(running, found[0])
    states.cancel(record)
    if json:
        print_json({"run": record.id, "cancelled": True})
    else:
        print(f"asked {record.id} to stop")


@app.command()
def resume(*, run: Run, json: Json = False) -> None:
    """Restart a run that has ended, in the same folder, from its last checkpoint."""
    from mixtral_recipes.executors.runs import records, states

    record = records.find(run)
    if record.executor == "slurm":
        described: dict[str, Any] = {"run": record.id, "job_id": states.resubmit(record)}
    else:
        from mixtral_recipes.executors.launch import restart

        described = restart(record)
    if json:
        print_json(described)
    elif record.executor == "slurm":
        print(f"{record.id} is now Slurm job {described['job_id']}")


def _plan(run_dir: Any) -> dict[str, dict[str, float]]:
    """What the planner expected of a run beside what it took; nothing before it has made steps, or where it is away."""
    from pathlib import Path

    from mixtral_recipes.errors import RecipeError
    from mixtral_recipes.reports.record import read_run

    try:
        return read_run(Path(run_dir)).against_plan()
    except (RecipeError, OSError):
        return {}


def _text(key: str, value: Any) -> str:
    return time.strftime("%F %T", time.localtime(value)) if key == "created" else str(value)
