"""What the numbers of a recipe may be, by the setting's name: one table, whatever part a setting is of.

Only what no training can use is refused: a learning rate that is not a number, a norm that divides by zero.
"""

import math
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers a setting may be.

    Attributes:
        low: The least.
        high: The most.
        above: Whether it must be more than ``low``.
        below: Whether it must be less than ``high``.
    """

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is one of them."""
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high) and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:g}"
        high = f" and {'less than' if self.below else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return f"a finite number, {low}{high}"


_POSITIVE, _NOT_NEGATIVE, _COUNT, _SHARE = Range(above=True), Range(), Range(1), Range(0, 1)
RANGES = {
    **dict.fromkeys(("lr", "adam_eps", "layernorm_epsilon", "rotary_base", "alpha", "hang_timeout_seconds"), _POSITIVE),
    **dict.fromkeys(
        (
            "min_lr", "weight_decay", "clip_grad", "init_method_std", "moe_aux_loss_coeff", "moe_z_loss_coeff", "seed",
            "warmup_steps", "constant_steps", "num_workers", "max_skipped_steps", "val_check_interval",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("max_steps", "dim", "log_every_n_steps", "num_nodes", "devices"), _COUNT),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "warmup_ratio", "hold_ratio"), _SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, below=True)),
    "moe_expert_capacity_factor": _POSITIVE,
}  # fmt: skip


def out_of_range(where: str, name: str, value: Any) -> str | None:
    """Why a number cannot be a setting's value; None where it can, or is no number.

    Args:
        where: The setting's path.
        name: The last part of it.
        value: Its value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    allowed = RANGES.get(name)
    if allowed is None:
        return f"{where}={value} is not a number that can be used; give a finite one." if value != value else None
    return None if allowed.holds(value) else f"{where}={value} is not allowed; it must be {allowed}."
