"""mixtral-recipes clusters: list the profiles in clusters.toml and try one out."""

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Cluster profiles for --executor slurm.")

_Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]


@app.command("list")
def list_clusters(as_json: _Json = False) -> None:
    """List the profiles."""
    from mixtral_recipes.executors.slurm.profile import cluster, profile_file, profiles

    names = list(profiles())
    if as_json:
        print(json.dumps({"file": str(profile_file()), "clusters": names}))
    elif not names:
        print(f"no profiles; write one into {profile_file()} (see docs/clusters.md)")
    else:
        for name in names:
            site = cluster(name)
            print(
                f"{name}: {site.mode}, partition {site.partition}, {'through ' + site.ssh if site.ssh else 'from here'}"
            )


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="Profile in clusters.toml.")],
    as_json: _Json = False,
) -> None:
    """Check a profile: its settings, Slurm's answer, the partition, the container runtime, the shared folder."""
    from mixtral_recipes.errors import EnvironmentProblem
    from mixtral_recipes.executors.checks import check_cluster, show
    from mixtral_recipes.executors.slurm.profile import cluster

    found = check_cluster(cluster(name))
    if as_json:
        print(json.dumps({"cluster": name, "checks": [check.as_json() for check in found]}))
    else:
        show(found)
    if any(check.verdict == "bad" for check in found):
        raise EnvironmentProblem(f"cluster {name!r} is not ready; see above.")
