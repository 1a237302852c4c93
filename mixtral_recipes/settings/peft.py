"""Which adapters are trained, in NeMo's spelling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings import adapted
from mixtral_recipes.settings.adapted import ALL_LINEAR
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.settings.precision import MegatronMixedPrecision

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
_OF_EXPERTS = ALL_LINEAR[2:]
HF_WHOLE = {"word_embeddings": "embed_tokens", "output_layer": "lm_head"}  # what modules_to_save may name, and peft's


@takes_nemos_arguments
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
        lora_dtype: Dtype of A and B; None uses the layer's.
        use_rslora: Scale by ``alpha / sqrt(dim)``, so that a larger rank does not learn more slowly (Kalajdzievski,
            arXiv 2312.03732).
        rank_pattern: ``dim`` of single layer names, e.g. ``{"linear_fc1": 8}``.
        alpha_pattern: ``alpha`` of single layer names.
        layers: The layers that are adapted, counted from 0: ``"8-31"``, ``"0,4-7"`` or a list; None is all.
        experts: The experts that are adapted, likewise, in every layer; ``"busiest:4"`` is the four of each layer that
            got most tokens in the run that ``router_load`` names. By layer, if it is a dict.
        router_load: The folder of a run whose metrics.jsonl says how many tokens each expert got.
        modules_to_save: Modules trained whole beside the adapters: ``"word_embeddings"``, ``"output_layer"``.
        loraplus_lr_ratio: B's learning rate over that of everything else (LoRA+); None is 1.
    """

    target_modules: list[str] | str = field(default_factory=lambda: list(ALL_LINEAR))
    exclude_modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: str = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    lora_dtype: torch.dtype | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: list[int] | str | None = None
    experts: list[int] | dict[str, list[int]] | str | None = None
    router_load: str | None = None
    modules_to_save: list[str] = field(default_factory=list)
    loraplus_lr_ratio: float | None = None

    def dim_of(self, layer: str) -> int:
        """The rank of a layer's adapter; ``layer`` is its name, with or without what it stands in."""
        return self.rank_pattern.get(layer.rsplit(".", 1)[-1], self.dim)

    def scale_of(self, layer: str) -> float:
        """What a layer's B A is multiplied by."""
        dim = self.dim_of(layer)
        alpha = self.alpha_pattern.get(layer.rsplit(".", 1)[-1], self.alpha)
        return alpha / (math.sqrt(dim) if self.use_rslora else dim)

    def targets(self) -> set[str]:
        """The layer names this scheme adapts.

        Raises:
            RecipeError: an unknown name, or another unknown word.
        """
        wanted = adapted.modules(self.target_modules, self.exclude_modules)
        for setting, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for name, value in pattern.items():
                if name not in wanted:
                    raise RecipeError(f"peft.{setting} names {name!r}, which is not adapted.{nearest(name, wanted)}")
                if not value > 0:
                    raise RecipeError(f"peft.{setting}.{name}={value} must be positive.")
        if self.dropout_position not in ("pre", "post"):
            raise RecipeError(f"peft.dropout_position={self.dropout_position!r}; use 'pre' or 'post'.")
        if self.lora_B_init_method != "zero":
            raise RecipeError(
                f"peft.lora_B_init_method={self.lora_B_init_method!r} is not supported; use 'zero', which starts from "
                "the base model."
            )
        targets = set(wanted)
        self._check_more(targets)
        return targets

    def _check_more(self, targets: set[str]) -> None:
        for name in self.modules_to_save:
            if name not in HF_WHOLE:
                ours = [own for own, theirs in HF_WHOLE.items() if theirs == name]
                better = (
                    f"Megatron calls {ours[0]}; use that name."
                    if ours
                    else f"it does not support.{nearest(name, list(HF_WHOLE))}"
                )
                raise RecipeError(f"peft.modules_to_save names {name!r}, which {better}")
        if self.loraplus_lr_ratio is not None and not self.loraplus_lr_ratio > 0:
            raise RecipeError(f"peft.loraplus_lr_ratio={self.loraplus_lr_ratio} must be positive.")
        if self.experts is not None and not targets & set(_OF_EXPERTS):
            raise RecipeError(
                f"peft.experts={self.experts!r} selects experts, but none of their layers is adapted; add "
                f"{' or '.join(_OF_EXPERTS)} to peft.target_modules."
            )

    def adapts(self, name: str) -> bool:
        """Whether a layer is adapted; ``name`` as a checkpoint has it, layers and experts counted over all ranks."""
        parts = name.split(".")
        if parts[-1] not in self.targets() or not adapted.names(self.layers, int(parts[2]), "peft.layers"):
            return False
        if "experts" not in parts:
            return True
        experts = self.experts.get(parts[2], []) if isinstance(self.experts, dict) else self.experts
        return adapted.names(experts, int(parts[parts.index("experts") + 1]), "peft.experts")

    def check_against(self, num_layers: int, num_experts: int) -> None:
        """Refuse a scheme that names what a model of these sizes does not have.

        Raises:
            RecipeError: names the layer or expert.
        """
        kind_of(self)
        self.targets()
        adapted.check(self.layers, num_layers, "peft.layers", "layer")
        if not isinstance(self.experts, dict):
            adapted.check(self.experts, num_experts, "peft.experts", "expert")
            return
        for layer, experts in self.experts.items():
            if not adapted.is_number(layer) or int(layer) >= num_layers:
                raise RecipeError(
                    f"peft.experts names layer {layer}, but the model has {num_layers} layers (0 to {num_layers - 1})."
                )
            adapted.check(experts or None, num_experts, f"peft.experts.{layer}", "expert")
        if not any(
            experts and adapted.names(self.layers, int(n), "peft.layers") for n, experts in self.experts.items()
        ):
            raise RecipeError("peft.experts names no expert in the layers that are adapted.")


@takes_nemos_arguments
@dataclass
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: ``y = m * (W + s B A) x / |W + s B A|``, m, A and B trained.

    The norm is taken of each row and held constant in the backward pass, as the paper proposes and peft does.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 4.3.
    """


@dataclass
class QLoRA(LoRA):
    """LoRA over a base whose attention and expert weights are kept in 4 or 8 bits, quantised while they are loaded.

    Router, norms, embedding and output layer are not quantised, and products are in the model's dtype.

    Attributes:
        bits: 4: NF4 with double quantisation, the bytes of bitsandbytes' ``load_in_4bit``. 8: int8 by row, those of its
            ``load_in_8bit``.
        block_size: Weights that share a scale, with 4 bits.
        cache: Keep the quantised base beside the imported checkpoint, so that the next run reads a quarter.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    """

    bits: int = 4
    block_size: int = 64
    cache: bool = False

    def check_base(self, precision: MegatronMixedPrecision, shape: ModelShape, topology: Topology) -> None:
        """Refuse settings with which the base cannot be quantised.

        Args:
            precision: The run's.
            shape: The model's sizes.
            topology: The run's layout.

        Raises:
            RecipeError: names the setting.
        """
        if self.bits not in (4, 8):
            raise RecipeError(f"peft.bits={self.bits}; use 4 (NF4) or 8 (int8).")
        if self.block_size not in BLOCK_SIZES:
            raise RecipeError(f"peft.block_size={self.block_size}; use {', '.join(map(str, BLOCK_SIZES))}.")
        if precision.fp8:
            raise RecipeError(
                f"trainer.plugins.fp8={precision.fp8!r} does not work with peft.class=QLoRA: the base is stored in "
                f"{self.bits} bits and multiplied in 16; set trainer.plugins.fp8=null, or use --peft lora."
            )
        if self.bits == 4:
            self._check_blocks(shape, topology)

    def _check_blocks(self, shape: ModelShape, topology: Topology) -> None:
        """Blocks lie in a row of one rank's part; where nothing cuts rows, also across them."""
        tp, etp = topology.tensor_model_parallel_size, topology.expert_tp
        q, kv = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        h, f = shape.hidden_size, shape.ffn_hidden_size
        for layer, rows, columns, cut in (
            ("linear_qkv", (q + 2 * kv) // tp, h, 1),
            ("linear_proj", h, q // tp, tp),
            ("linear_fc1", f // etp, h, 1),
            ("linear_fc2", h, f // etp, etp),
        ):
            if columns % self.block_size and (cut > 1 or rows * columns % self.block_size):
                by = f" on each of {cut} tensor-parallel ranks" if cut > 1 else ""
                raise RecipeError(
                    f"peft.block_size={self.block_size} does not divide {layer}'s rows of {columns} weights{by}; use a "
                    f"smaller block (one of {', '.join(map(str, BLOCK_SIZES))}), less tensor parallelism, or "
                    "peft.bits=8."
                )


SCHEMES: dict[str, type[LoRA]] = {"LoRA": LoRA, "DoRA": DoRA, "QLoRA": QLoRA}


def kind_of(scheme: LoRA) -> type[LoRA]:
    """Which of our schemes this is: its class, or what a class of a user's own derives from.

    Such a class may have other defaults. Its checkpoints are read without it, so it may not calculate differently.

    Raises:
        RecipeError: it overrides a method.
    """
    kind = next(one for one in type(scheme).__mro__ if one in SCHEMES.values())
    for name in dir(kind):
        theirs, ours = getattr(type(scheme), name, None), getattr(kind, name)
        if not name.startswith("__") and callable(ours) and theirs is not ours:
            raise RecipeError(
                f"peft={type(scheme).__name__} overrides {kind.__name__}.{name}, and its adapters could not be read "
                "without it; a scheme that computes differently must be added to the package (docs/extending.md)."
            )
    return kind


def recorded(scheme: LoRA) -> dict[str, Any]:
    """A scheme as a checkpoint's run.json records it: its kind and that kind's fields."""
    kind = kind_of(scheme)
    values = {f.name: getattr(scheme, f.name) for f in fields(kind)}
    dtype = values.pop("lora_dtype")
    return {"class": kind.__name__, **values, "lora_dtype": dtype and str(dtype)}


def scheme_of(recorded: Mapping[str, Any]) -> LoRA:
    """The inverse of `recorded`; A and B keep the dtype they are stored in.

    Raises:
        KeyError: no such scheme.
        TypeError: a field that none has.
    """
    kind = SCHEMES[recorded["class"]]
    known = {f.name for f in fields(kind)} - {"lora_dtype"}
    return kind(**{name: value for name, value in recorded.items() if name in known})


# NeMo's names of the schemes.
PEFT_STR2CLS: dict[str, type[LoRA]] = {"LoRA": LoRA, "lora": LoRA, "DoRA": DoRA, "dora": DoRA, "qlora": QLoRA}
