"""Number formats of a run, in NeMo's spelling."""

from dataclasses import dataclass

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology, fp8_weights_pay
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

PRECISIONS = ("32", "bf16-mixed", "16-mixed")
FP8_FORMATS = ("hybrid", "e4m3")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@takes_nemos_arguments
@dataclass
class MegatronMixedPrecision:
    """Mixed precision in NeMo's spelling.

    Attributes:
        precision: ``"bf16-mixed"`` (bf16 weights and activations, fp32 master weights), ``"16-mixed"`` (fp16 with loss
            scaling) or ``"32"``.
        grad_reduce_in_fp32: Whether gradients are reduced in fp32; None keeps the DDP config's own setting.
        fp8: None, ``"hybrid"`` (e4m3 forward, e5m2 backward) or ``"e4m3"``; needs Transformer Engine and an FP8 GPU.
        fp8_recipe: ``"delayed"``, ``"tensorwise"``, ``"blockwise"`` or ``"mxfp8"``.
        fp8_param_gather: Whether linear layers keep their weights in FP8, and ranks gather them so, instead of casting
            bf16 weights for each product; None decides by `keeps_fp8_weights`.
        first_last_layers_bf16: Whether the first and last layers stay in bf16.
        num_layers_at_start_in_bf16: How many at the start.
        num_layers_at_end_in_bf16: How many at the end.
        fp8_margin: Delayed scaling: margin of the scaling factor.
        fp8_amax_history_len: Delayed scaling: steps of history.
        fp8_amax_compute_algo: Delayed scaling: ``"max"`` or ``"most_recent"``.
        loss_scale: fp16: a fixed loss scale; None scales dynamically.
        initial_loss_scale: fp16: where dynamic scaling starts.
        min_loss_scale: fp16: its floor.
        loss_scale_window: fp16: good steps before the scale doubles.
        hysteresis: fp16: bad steps before it halves.
    """

    precision: str = "bf16-mixed"
    grad_reduce_in_fp32: bool | None = None
    fp8: str | None = None
    fp8_recipe: str = "delayed"  # NeMo's default
    fp8_param_gather: bool | None = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1024  # NeMo's fp8 plugins
    fp8_amax_compute_algo: str = "max"
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**32  # Megatron's default
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2

    @property
    def token_multiple(self) -> int:
        """What the number of tokens in a matrix product must be a multiple of."""
        if not self.fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def keeps_fp8_weights(self, topology: Topology, *, frozen: bool) -> bool:
        """Whether linear layers keep their weights in FP8, where ``fp8_param_gather`` leaves it open too.

        Args:
            topology: The run's layout.
            frozen: Whether only adapters are trained.
        """
        if not self.fp8:
            return False
        return fp8_weights_pay(topology, frozen=frozen) if self.fp8_param_gather is None else self.fp8_param_gather

    def check(self) -> None:
        """Refuse words and combinations that no machine runs.

        Raises:
            RecipeError: names the setting, its value and what it may be.
        """
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"trainer.plugins.precision={self.precision!r} is not supported; use "
                f"{', '.join(map(repr, PRECISIONS))}."
            )
        if not self.fp8:
            return
        if self.fp8 not in FP8_FORMATS:
            raise RecipeError(f"trainer.plugins.fp8={self.fp8!r} is not supported; use 'hybrid' or 'e4m3'.")
        if self.fp8_recipe not in FP8_RECIPES:
            raise RecipeError(
                f"trainer.plugins.fp8_recipe={self.fp8_recipe!r} is not supported; use {', '.join(FP8_RECIPES)}."
            )
        if self.precision != "bf16-mixed":
            raise RecipeError(
                f"trainer.plugins.fp8={self.fp8!r} does not work with precision={self.precision!r}: FP8 products need "
                "a bf16 model; set trainer.plugins.precision='bf16-mixed'."
            )
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise RecipeError(
                "trainer.plugins.first_last_layers_bf16=True does not work with fp8_recipe='delayed': delayed "
                "scaling keeps one state for all layers; use tensorwise, blockwise or mxfp8."
            )
