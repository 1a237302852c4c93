"""``mixtral-recipes clusters``: list the profiles in clusters.toml and try one out."""

import dataclasses
from typing import Annotated

from mixtral_recipes.cli.options.groups import App, argument
from mixtral_recipes.cli.options.result import Json
from mixtral_recipes.cli.output import print_checks, print_json, print_table, table

app = App("List and check the Slurm clusters you can reach.")


@app.command("list")
def list_clusters(*, json: Json = False) -> None:
    """List the profiles in clusters.toml."""
    from mixtral_recipes.executors.slurm.profile import cluster, profile_file, profiles

    sites = {name: cluster(name) for name in profiles()}
    if json:
        print_json({"file": str(profile_file()), "clusters": list(sites)})
    elif not sites:
        print(f"no profiles; add one to {profile_file()} (see docs/guide/clusters.md)")
    else:
        rows = [(name, site.mode, site.partition or "-", site.ssh or "from here") for name, site in sites.items()]
        print_table(table(("cluster", "mode", "partition", "reached through"), rows))


@app.command()
def check(*, name: Annotated[str, argument("NAME", "Profile.")], json: Json = False) -> None:
    """Check a profile: Slurm, partition, container runtime, shared folder."""
    from mixtral_recipes.errors import EnvironmentProblem
    from mixtral_recipes.executors.checks import check_cluster
    from mixtral_recipes.executors.slurm.profile import cluster

    found = check_cluster(cluster(name))
    if json:
        print_json({"cluster": name, "checks": [dataclasses.asdict(check) for check in found]})
    else:
        print_checks(found)
    if any(check.verdict == "bad" for check in found):
        raise EnvironmentProblem(f"cluster {name!r} is not ready; see above.")
