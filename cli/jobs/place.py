"""What a job's options set of its cluster's profile."""

from typing import Any

from mixtral_recipes.cli.options.place import PlaceOptions
from mixtral_recipes.errors import LaunchError


def slurm_settings(options: PlaceOptions) -> dict[str, Any]:
    """Settings over the profile's, e.g. ``{"partition": "gpu"}``.

    Raises:
        LaunchError: a setting that is not known, or one for Slurm without ``--executor slurm``.
    """
    from mixtral_recipes.executors.slurm.profile import settings_from

    own = {name: getattr(options, name) for name in ("account", "partition", "time", "retries")}
    given = {name: value for name, value in own.items() if value is not None}
    settings = settings_from(options.slurm or []) | given
    names = ["cluster"] * bool(options.cluster) + list(given) + ["slurm"] * bool(options.slurm)
    if names and options.executor != "slurm":
        ignored = ", ".join(f"--{name}" for name in names)
        raise LaunchError(f"{ignored}: no effect with --executor {options.executor}; use --executor slurm.")
    return settings
