"""Where a job runs, from its options."""

from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.cli.options.place import PlaceOptions
from mixtral_recipes.errors import LaunchError


@dataclass
class Place:
    """Where a job runs.

    Attributes:
        executor: ``direct``, ``local`` or ``slurm``.
        cluster: A profile of clusters.toml, for Slurm.
        detach: Whether to return once the job is queued.
        settings: Settings over the profile's, e.g. ``{"partition": "gpu"}``.
    """

    executor: str = "local"
    cluster: str | None = None
    detach: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def place(options: PlaceOptions) -> Place:
    """Where a job runs.

    Raises:
        LaunchError: a setting that is not known, or one for Slurm without ``--executor slurm``.
    """
    from mixtral_recipes.executors.slurm.profile import settings_from

    own = {name: getattr(options, name) for name in ("account", "partition", "time", "retries")}
    given = {name: value for name, value in own.items() if value is not None}
    executor, more = options.executor.value, options.slurm or []
    settings = settings_from(more) | given
    ignored = [f"--{name}" for name in (["cluster"] if options.cluster else []) + list(given)] + ["--slurm"] * bool(
        more
    )
    if ignored and executor != "slurm":
        raise LaunchError(f"{', '.join(ignored)}: no effect with --executor {executor}; use --executor slurm.")
    return Place(executor, options.cluster, options.detach, settings)
