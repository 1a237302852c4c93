"""What the numbers of a recipe may be, by the setting's name: one table, whatever part a setting is of.

Only what no training can use is refused: a learning rate that is not a number, a norm that divides by zero. A number
that is not in the table must be finite, and a whole one must fit 64 bits. The one door to it is `out_of_range`: of the
check of a whole recipe (`check`), built or not, and of a recipe in outline (`overrides/outline_paths`).
"""

import math
import sys
from typing import Any, NamedTuple

from mixtral_recipes.layout.shapes import LARGEST

_LARGEST, _LARGEST_WHOLE = sys.float_info.max, (1 << 63) - 1


class Range(NamedTuple):
    """The numbers a setting may be, all of them finite.

    Attributes:
        low: The least.
        high: The most.
        above: Whether it must be more than ``low``.
        below: Whether it must be less than ``high``.
    """

    low: float = 0
    high: float = _LARGEST
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is one of them."""
        if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        bounds = []
        if self.low > -_LARGEST:
            bounds.append(f"{'more than' if self.above else 'at least'} {_told(self.low)}")
        if self.high < _LARGEST:
            bounds.append(f"{'less than' if self.below else 'at most'} {_told(self.high)}")
        return ", ".join(
            ["a finite number", " and ".join(bounds)] if bounds else ["a finite number of reasonable size"]
        )


def _told(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


_ANY, _POSITIVE, _NOT_NEGATIVE, _COUNT, _SHARE = Range(-_LARGEST), Range(above=True), Range(), Range(1), Range(0, 1)
RANGES = {
    **dict.fromkeys(
        (
            "lr", "adam_eps", "layernorm_epsilon", "rotary_base", "alpha", "hang_timeout_seconds",
            "moe_expert_capacity_factor", "max_disk_gb", "loraplus_lr_ratio", "initial_loss_scale", "loss_scale",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(
        (
            "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay", "clip_grad", "init_method_std",
            "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps", "seed", "warmup_steps", "constant_steps",
            "num_workers", "max_skipped_steps", "val_check_interval", "limit_val_batches", "limit_test_batches",
            "start_step", "end_step",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "max_steps", "dim", "log_every_n_steps", "every_n_train_steps",
            "recompute_num_layers", "gc_interval_train", "gc_interval_val", "steps", "num_train_samples",
            "num_val_samples", "num_test_samples", "num_dataset_builder_threads",
        ),
        _COUNT,
    ),
    **{name: Range(1, most) for name, most in LARGEST.items()},
    "moe_ffn_hidden_size": Range(1, LARGEST["ffn_hidden_size"]),
    "moe_router_topk": Range(1, LARGEST["num_moe_experts"]),
    **dict.fromkeys(("warmup_ratio", "hold_ratio"), _SHARE),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "attention_dropout", "hidden_dropout", "dropout"), Range(0, 1, below=True)
    ),
    **dict.fromkeys(("days", "hours", "minutes", "seconds"), Range(0, 1e6)),
    "num_nodes": Range(1, 100_000),
    "devices": Range(1, 1_024),
    "val_proportion": Range(0, 1, below=True),
    "save_top_k": Range(-1),  # which keeps all
    "packed_sequence_size": Range(-1),  # which does not pack
    "grad_norm_skip_threshold": Range(0, math.inf, above=True),  # Megatron's default, which skips nothing
}  # fmt: skip


def out_of_range(where: str, name: str, value: Any) -> str | None:
    """Why a number, or one in a list, cannot be a setting's value; None if it can, or if it is not a number.

    Args:
        where: The setting's path.
        name: The last part of it.
        value: Its value.
    """
    if isinstance(value, list | tuple):
        return next(filter(None, (out_of_range(f"{where}[{n}]", name, item) for n, item in enumerate(value))), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    allowed = RANGES.get(name, _ANY)
    if isinstance(value, int) and value > min(allowed.high, _LARGEST_WHOLE):
        allowed = allowed._replace(high=min(allowed.high, _LARGEST_WHOLE))
    return None if allowed.holds(value) else f"{where}={_short(value)} is not allowed; it must be {allowed}."


def _short(number: float) -> str:
    """A number for a message; one of thousands of digits is not printed."""
    return str(number) if abs(number) < 10**40 or isinstance(number, float) else "(a number of more than 40 digits)"
