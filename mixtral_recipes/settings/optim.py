"""Optimizer and learning-rate schedules, in NeMo's spelling."""

from dataclasses import dataclass, field
from typing import Any

from megatron.core.optimizer.optimizer_config import OptimizerConfig

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@dataclass
class LRSchedule:
    """What all schedules share. Steps are counted over the whole run.

    Attributes:
        min_lr: Where the decay ends.
        max_steps: Steps of the whole schedule; None uses the trainer's.
    """

    min_lr: float = 0.0
    max_steps: int | None = None

    def megatron(self, max_steps: int) -> dict[str, Any]:
        """The arguments of Megatron's OptimizerParamScheduler.

        Args:
            max_steps: Steps of the whole schedule.

        Returns:
            ``lr_warmup_steps``, ``lr_decay_steps``, ``lr_decay_style`` and the style's own arguments.
        """
        raise TypeError(f"{type(self).__name__} must define megatron()")


@takes_nemos_arguments
@dataclass
class CosineAnnealingScheduler(LRSchedule):
    """Linear warmup, cosine decay to ``min_lr``, then ``constant_steps`` at ``min_lr``.

    Attributes:
        warmup_steps: Steps of linear warmup from 0.
        constant_steps: Steps at ``min_lr`` at the end.
    """

    warmup_steps: int = 750
    constant_steps: int = 0
    min_lr: float = 6e-7

    def megatron(self, max_steps: int) -> dict[str, Any]:
        """As the base says.

        Raises:
            RecipeError: no step is left to decay over.
        """
        decay_steps = max_steps - self.constant_steps
        if decay_steps < 1:
            raise RecipeError(
                f"optim.lr_scheduler.constant_steps={self.constant_steps} leaves none of "
                f"trainer.max_steps={max_steps} for the decay."
            )
        warmup = _within(self.warmup_steps, decay_steps)
        return {"lr_warmup_steps": warmup, "lr_decay_steps": decay_steps, "lr_decay_style": "cosine"}


@dataclass
class _Warmup(LRSchedule):
    """A schedule that begins with a linear warmup from 0.

    Attributes:
        warmup_steps: Its steps.
        warmup_ratio: Its share of the schedule instead; None uses ``warmup_steps``.
    """

    warmup_steps: int = 750
    warmup_ratio: float | None = None

    def warmup(self, max_steps: int) -> int:
        """Steps of warmup."""
        asked = self.warmup_steps if self.warmup_ratio is None else int(self.warmup_ratio * max_steps)
        return _within(asked, max_steps)


@takes_nemos_arguments
@dataclass
class WarmupPolicyScheduler(_Warmup):
    """Linear warmup, then constant."""

    def megatron(self, max_steps: int) -> dict[str, Any]:
        """As the base says."""
        return {
            "lr_warmup_steps": self.warmup(max_steps),
            "lr_decay_steps": max_steps,
            "lr_decay_style": "constant",
        }


@takes_nemos_arguments
@dataclass
class WarmupHoldPolicyScheduler(WarmupPolicyScheduler):
    """Linear warmup, then constant: NeMo holds the learning rate to the end as well."""


@takes_nemos_arguments
@dataclass
class WarmupAnnealingScheduler(_Warmup):
    """Linear warmup, then linear decay to ``min_lr``."""

    def megatron(self, max_steps: int) -> dict[str, Any]:
        """As the base says."""
        return {"lr_warmup_steps": self.warmup(max_steps), "lr_decay_steps": max_steps, "lr_decay_style": "linear"}


_DECAYS = {"linear": "linear", "one_minus_square_root": "minus_sqrt"}  # NeMo's word -> Megatron's


@takes_nemos_arguments
@dataclass
class WarmupHoldAnnealScheduler(LRSchedule):
    """Linear warmup, a plateau, then decay to ``min_lr``: Megatron's WSD.

    Attributes:
        warmup_ratio: Share of the schedule spent on warmup; None means no warmup.
        hold_ratio: Share that stays at the peak; None means no hold.
        decay_schedule: ``"linear"`` or ``"one_minus_square_root"``.
    """

    warmup_ratio: float | None = None
    hold_ratio: float | None = None
    decay_schedule: str = "linear"

    def megatron(self, max_steps: int) -> dict[str, Any]:
        """As the base says.

        Raises:
            RecipeError: an unknown decay, or shares that leave no step for it.
        """
        if self.decay_schedule not in _DECAYS:
            raise RecipeError(
                f"optim.lr_scheduler.decay_schedule={self.decay_schedule!r} is not supported; use "
                f"{' or '.join(map(repr, _DECAYS))}."
            )
        before = (self.warmup_ratio or 0.0) + (self.hold_ratio or 0.0)
        if not 0 <= before < 1:
            raise RecipeError(
                f"optim.lr_scheduler: warmup_ratio and hold_ratio are {before:g} of the run together; leave some of it "
                "for the decay."
            )
        return {
            "lr_warmup_steps": int((self.warmup_ratio or 0.0) * max_steps),
            "lr_decay_steps": max_steps,
            "lr_decay_style": "WSD",
            "wsd_decay_steps": max_steps - int(before * max_steps),
            "lr_wsd_decay_style": _DECAYS[self.decay_schedule],
        }


def _within(warmup: int, steps: int) -> int:
    """A warmup that ends before the schedule does.

    A short run of a long recipe (max_steps=20 with warmup 50) keeps the recipe's proportions visible: it warms up over
    the first tenth instead of never reaching the learning rate.
    """
    return warmup if warmup < steps else steps // 10


@takes_nemos_arguments
@dataclass
class MegatronOptimizerModule:
    """An optimizer to build.

    Attributes:
        config: Megatron's OptimizerConfig.
        lr_scheduler: The schedule; None keeps the learning rate constant.
    """

    config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, use_distributed_optimizer=True))
    lr_scheduler: LRSchedule | None = None
