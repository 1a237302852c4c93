"""Which checkpoints of a run are kept."""

import math
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.checkpoints.format import manifest
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system import locks
from mixtral_recipes.system.files import remove_folder


@dataclass(frozen=True)
class Kept:
    """What matters about a checkpoint when deciding whether to keep it.

    Attributes:
        path: Its folder.
        step: When it was written.
        score: Its metric, lower is better; infinite where it has none.
        nbytes: Its size.
    """

    path: Path
    step: int
    score: float
    nbytes: int = 0


def surplus(found: list[Kept], save_top_k: int) -> list[Kept]:
    """What the policy does not keep: all but the newest and the best ``save_top_k`` (-1 keeps all), worst first."""
    if save_top_k < 0:
        return []
    by_age = sorted(found, key=lambda kept: kept.step)
    best = _best_first(by_age)[:save_top_k]
    return _worst_first([kept for kept in by_age[:-1] if kept not in best])


def to_make_room(found: list[Kept], needed: int, limit: int) -> list[Kept]:
    """What must be deleted so that one more checkpoint fits under a limit; the newest stays.

    Raises:
        EnvironmentProblem: the newest and the next do not fit under it together.
    """
    by_age = sorted(found, key=lambda kept: kept.step)
    total = needed + sum(kept.nbytes for kept in found)
    gone: list[Kept] = []
    for kept in _worst_first(by_age[:-1]):
        if total <= limit:
            break
        gone.append(kept)
        total -= kept.nbytes
    if total > limit:
        raise EnvironmentProblem(
            f"log.ckpt.max_disk_gb={limit / 1e9:g} is too small: the newest checkpoint and the next one need "
            f"{total / 1e9:.3g} GB together; raise it."
        )
    return gone


def remove_unused(surplus: list[Kept]) -> None:
    """Remove checkpoints, but for those that a command reads: they are surplus after the next save too."""
    for kept in surplus:
        with locks.unused(kept.path / manifest.NAME) as unused:
            if unused:
                remove_folder(kept.path)


def _best_first(by_age: list[Kept]) -> list[Kept]:
    # Among equals the newer is better; NaN is no better than no score.
    return sorted(by_age, key=lambda kept: (math.inf if math.isnan(kept.score) else kept.score, -kept.step))


def _worst_first(by_age: list[Kept]) -> list[Kept]:
    return _best_first(by_age)[::-1]
