"""Which adapters are trained, in NeMo's spelling."""

from dataclasses import dataclass, field

import torch

from mixtral_recipes.errors import RecipeError, nearest

ALL_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PRESETS = {"all-linear": ALL_LINEAR, "attention": ("linear_qkv", "linear_proj")}


@dataclass
class LoRA:
    """Low-rank adaptation: ``y = W x + alpha / dim * B A x``, only A and B trained.

    Attributes:
        target_modules: Megatron layer names, or a preset: ``"all-linear"`` (attention and every expert) or
            ``"attention"``.
        exclude_modules: Layer names left out again.
        dim: Rank (Hugging Face: ``r``).
        alpha: Scale numerator (Hugging Face: ``lora_alpha``).
        dropout: Probability, on the adapter's input or output.
        dropout_position: ``"pre"`` or ``"post"``.
        lora_A_init_method: ``"xavier"`` or ``"uniform"`` (Kaiming uniform, as peft).
        lora_B_init_method: ``"zero"``.
        lora_dtype: Dtype of A and B; None takes the layer's.
    """

    target_modules: list[str] | str = field(default_factory=lambda: list(ALL_LINEAR))
    exclude_modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    dropout_position: str = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    lora_dtype: torch.dtype | None = None

    def targets(self) -> set[str]:
        """The layer names this scheme adapts.

        Raises:
            RecipeError: an unknown name, or another unknown word.
        """
        wanted = self.target_modules
        if isinstance(wanted, str):
            wanted = PRESETS.get(wanted, (wanted,))
        for name in (*wanted, *self.exclude_modules):
            if name not in ALL_LINEAR:
                raise RecipeError(f"peft.target_modules names {name!r}.{nearest(name, (*ALL_LINEAR, *PRESETS))}")
        if self.dropout_position not in ("pre", "post"):
            raise RecipeError(f"peft.dropout_position={self.dropout_position!r}; use 'pre' or 'post'.")
        if self.lora_B_init_method != "zero":
            raise RecipeError(f"peft.lora_B_init_method={self.lora_B_init_method!r}; only 'zero' starts at the base.")
        return set(wanted) - set(self.exclude_modules)


@dataclass
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: ``y = m * (W + s B A) x / |W + s B A|``, m, A and B trained.

    The norm is taken of each row and held constant in the backward pass, as the paper proposes and peft does.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 4.3.
    """
