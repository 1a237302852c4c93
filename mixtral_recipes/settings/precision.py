"""Number formats of a run, in one object: what the model, the optimizer and the gradient reduction use."""

from dataclasses import dataclass
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError

PRECISIONS = ("32", "bf16-mixed", "16-mixed")
FP8_FORMATS = ("hybrid", "e4m3")

# Compute capability each scaling recipe's kernels need. Source: Transformer Engine 2.x `pytorch/quantization.py`
# (check_fp8_support, check_fp8_block_scaling_support, check_mxfp8_support).
_CAPABILITY = {"delayed": (9, 0), "tensorwise": (9, 0), "blockwise": (9, 0), "mxfp8": (10, 0)}
_GENERATION = {(9, 0): "Hopper (H100, H200) or later", (10, 0): "Blackwell (B200, GB200)"}


@dataclass
class MegatronMixedPrecision:
    """Mixed precision in NeMo's spelling.

    Attributes:
        precision: ``"bf16-mixed"`` (bf16 weights and activations, fp32 master weights), ``"16-mixed"`` (fp16 with loss
            scaling) or ``"32"``.
        grad_reduce_in_fp32: Whether gradients are added up in fp32; None keeps the DDP config's own setting.
        fp8: None, ``"hybrid"`` (e4m3 forward, e5m2 backward) or ``"e4m3"``; needs Transformer Engine and such a GPU.
        fp8_recipe: ``"delayed"``, ``"tensorwise"``, ``"blockwise"`` or ``"mxfp8"``.
        fp8_param_gather: Whether parameters are gathered in FP8.
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
    fp8_param_gather: bool = False
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
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations outside FP8 products."""
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"trainer.plugins.precision={self.precision!r} is not known; use {', '.join(map(repr, PRECISIONS))}."
            )
        return {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[self.precision]

    def model_fields(self) -> dict[str, Any]:
        """TransformerConfig fields this precision sets."""
        dtype = self.dtype
        fields: dict[str, Any] = {
            "bf16": dtype is torch.bfloat16,
            "fp16": dtype is torch.float16,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "autocast_dtype": dtype,
            "enable_autocast": False,
        }
        if self.fp8:
            same_name = (
                "fp8",
                "fp8_recipe",
                "first_last_layers_bf16",
                "num_layers_at_start_in_bf16",
                "num_layers_at_end_in_bf16",
                "fp8_margin",
                "fp8_amax_history_len",
                "fp8_amax_compute_algo",
            )
            fields |= {name: getattr(self, name) for name in same_name}
            fields["fp8_param"] = self.fp8_param_gather
        return fields

    def optimizer_fields(self) -> dict[str, Any]:
        """OptimizerConfig fields this precision sets."""
        fields: dict[str, Any] = {
            "bf16": self.dtype is torch.bfloat16,
            "fp16": self.dtype is torch.float16,
            "params_dtype": self.dtype,
        }
        if self.dtype is torch.float16:
            same_name = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
            fields |= {name: getattr(self, name) for name in same_name}
        if self.fp8:
            fields |= {"fp8_recipe": self.fp8_recipe, **self._mxfp8_buffers()}
        return fields

    def ddp_fields(self) -> dict[str, Any]:
        """DistributedDataParallelConfig fields this precision sets."""
        fields: dict[str, Any] = {"fp8_param_gather": self._gathers_fp8, **self._mxfp8_buffers()}
        if self.grad_reduce_in_fp32 is not None:
            fields["grad_reduce_in_fp32"] = self.grad_reduce_in_fp32
        return fields

    @property
    def token_multiple(self) -> int:
        """What the number of tokens in a matrix product must be a multiple of."""
        if not self.fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def _gathers_fp8(self) -> bool:
        return bool(self.fp8 and self.fp8_param_gather)

    def _mxfp8_buffers(self) -> dict[str, bool]:
        # MXFP8 weights are two copies, by row and by column; Megatron gathers them through the gradient buffer.
        return {"reuse_grad_buf_for_mxfp8_param_ag": self._gathers_fp8 and self.fp8_recipe == "mxfp8"}

    def check(self) -> None:
        """Refuse words and combinations that no machine runs.

        Raises:
            RecipeError: names the setting, its value and what it may be.
        """
        _ = self.dtype
        if not self.fp8:
            return
        if self.fp8 not in FP8_FORMATS:
            raise RecipeError(f"trainer.plugins.fp8={self.fp8!r} is not known; use 'hybrid' or 'e4m3'.")
        if self.fp8_recipe not in _CAPABILITY:
            raise RecipeError(
                f"trainer.plugins.fp8_recipe={self.fp8_recipe!r} is not known; use {', '.join(_CAPABILITY)}."
            )
        if self.precision != "bf16-mixed":
            raise RecipeError(
                f"trainer.plugins.fp8={self.fp8!r} with precision={self.precision!r}: FP8 products stand in a bf16 "
                "model; set trainer.plugins.precision='bf16-mixed'."
            )
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise RecipeError(
                "trainer.plugins.first_last_layers_bf16=True with fp8_recipe='delayed': delayed scaling keeps one "
                "state for all layers; use tensorwise, blockwise or mxfp8."
            )

    def check_device(self) -> None:
        """Refuse a format this machine's GPU does not have.

        Raises:
            RecipeError: names the GPU generation that is needed.
        """
        self.check()
        if not self.fp8:
            return
        needed = _CAPABILITY[self.fp8_recipe]
        present = torch.cuda.is_available()
        if present and torch.cuda.get_device_capability() >= needed:
            return
        found = f"this machine has {torch.cuda.get_device_name()}" if present else "there is no GPU"
        raise RecipeError(
            f"trainer.plugins.fp8={self.fp8!r} with fp8_recipe={self.fp8_recipe!r} needs {_GENERATION[needed]}; "
            f"{found}; set trainer.plugins.fp8=null or choose such a machine."
        )
