"""Mixtral model configurations, as subclasses of Megatron's TransformerConfig.

Every TransformerConfig field can be overridden under ``model.config``. Parallel sizes stay at 1 here: they are stated
once, in ``trainer.strategy``, and put into the config when the model is built (`with_topology`).
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mixtral_recipes.layout.shapes import MIXTRAL_8X3B, MIXTRAL_8X7B, MIXTRAL_8X22B, MIXTRAL_TINY
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA

_Balancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none"]


@takes_nemos_arguments
@dataclass
class MixtralConfig(TransformerConfig):
    """The fields all Mixtral models share.

    Sizes are `layout/shapes.py`'s, other values Mixtral 8x7B's published config.json where nothing else is said.
    Routing is Megatron's spelling of Hugging Face's (softmax over the chosen experts equals softmax over all, then
    renormalising over the chosen).

    Attributes:
        default_tokenizer: What a model of this kind is given where it starts from random weights and the recipe names
            no tokenizer.
    """

    default_tokenizer: ClassVar[str | None] = None

    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    activation_func: Callable[..., Any] = F.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    position_embedding_type: str = "rope"
    share_embeddings_and_output_weights: bool = False

    num_layers: int = MIXTRAL_8X7B.num_layers
    hidden_size: int = MIXTRAL_8X7B.hidden_size
    num_attention_heads: int = MIXTRAL_8X7B.num_attention_heads
    num_query_groups: int | None = MIXTRAL_8X7B.num_query_groups
    ffn_hidden_size: int | None = MIXTRAL_8X7B.ffn_hidden_size
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02

    vocab_size: int = MIXTRAL_8X7B.vocab_size
    make_vocab_size_divisible_by: int = MIXTRAL_8X7B.make_vocab_size_divisible_by  # times the tensor-parallel size
    seq_length: int = MIXTRAL_8X7B.max_position_embeddings
    max_position_embeddings: int = MIXTRAL_8X7B.max_position_embeddings
    rotary_base: float = 1e6  # rope_theta
    rotary_percent: float = 1.0

    num_moe_experts: int | None = MIXTRAL_8X7B.num_moe_experts
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False  # True would not renormalise over the chosen experts
    moe_router_load_balancing_type: _Balancing | list[_Balancing] = "aux_loss"  # pyright: ignore[reportIncompatibleVariableOverride]  # Megatron says str
    moe_aux_loss_coeff: float | list[float] = 0.01  # NeMo's recipes; config.json's router_aux_loss_coef is 0.02
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    freeze_router: bool = False  # full fine-tuning may keep the pretrained routing

    bf16: bool = True
    params_dtype: torch.dtype = torch.bfloat16

    # Fused kernels (`models/acceleration.py`) are switched on where they run, each unless it is given; False leaves all
    # of them alone.
    accelerate: bool = True
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    masked_softmax_fusion: bool = False
    apply_rope_fusion: bool = False
    cross_entropy_loss_fusion: bool = False
    gradient_accumulation_fusion: bool = False

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Note which fields are given: those are the recipe's word, where others are a checkpoint's (`is_given`)."""
        made = super().__new__(cls)
        positional = [each.name for each in dataclasses.fields(cls)][: len(values)]
        made.__dict__["_given"] = frozenset(positional) | named.keys()
        return made

    def is_given(self, name: str) -> bool:
        """Whether a field was named when the configuration was made, or set since."""
        default = type(self).__dataclass_fields__[name].default
        return name in self.__dict__["_given"] or getattr(self, name) != default

    def changed(self, **fields: Any) -> Self:
        """A copy with other values, checked by Megatron; unlike `dataclasses.replace`'s it knows what was given."""
        copy = dataclasses.replace(self, **fields)
        copy.__dict__["_given"] = self.__dict__["_given"] | fields.keys()
        return copy

    def __post_init__(self) -> None:
        """As Megatron's, but for two things it refuses.

        One expert per token without pre-softmax, because the router then learns from the auxiliary loss alone. So it is
        in transformers, which divides the chosen probability by itself; with pre-softmax the model would compute
        something else. And recomputing ``moe_act`` without grouped experts, which `models/acceleration.py` switches on
        later, where they run.
        """
        grouped_later = self.accelerate and "moe_act" in (self.recompute_modules or ()) and not self.moe_grouped_gemm
        self.moe_grouped_gemm |= grouped_later
        single = self.moe_router_topk == 1 and not self.moe_router_pre_softmax
        self.moe_router_pre_softmax |= single
        self.moe_ffn_hidden_size = self.moe_ffn_hidden_size or self.ffn_hidden_size  # Megatron does so with a warning
        if self.moe_permute_fusion or self.apply_rope_fusion:  # Megatron looks for the kernels: in this order
            for name in ("torch._meta_registrations", "megatron.core.tensor_parallel"):
                importlib.import_module(name)
        super().__post_init__()
        # Said by cuda_graph_impl from here on; a copy of the configuration would be refused for both.
        self.enable_cuda_graph = self.external_cuda_graph = False
        self.moe_router_pre_softmax &= not single
        self.moe_grouped_gemm &= not grouped_later


@takes_nemos_arguments
@dataclass
class MixtralConfig8x3B(MixtralConfig):
    """Mixtral 8x3B."""

    hidden_size: int = MIXTRAL_8X3B.hidden_size
    ffn_hidden_size: int | None = MIXTRAL_8X3B.ffn_hidden_size


@takes_nemos_arguments
@dataclass
class MixtralConfig8x7B(MixtralConfig):
    """Mixtral 8x7B: 46,702,792,704 parameters."""


@takes_nemos_arguments
@dataclass
class MixtralConfig8x22B(MixtralConfig):
    """Mixtral 8x22B: 140,620,634,112 parameters."""

    num_layers: int = MIXTRAL_8X22B.num_layers
    hidden_size: int = MIXTRAL_8X22B.hidden_size
    num_attention_heads: int = MIXTRAL_8X22B.num_attention_heads
    ffn_hidden_size: int | None = MIXTRAL_8X22B.ffn_hidden_size


@takes_nemos_arguments
@dataclass
class MixtralConfigTiny(MixtralConfig):
    """The embedded model's shape: a Mixtral small enough to train on a laptop's CPU in minutes."""

    default_tokenizer: ClassVar[str | None] = "embedded://mixtral_tiny"

    num_layers: int = MIXTRAL_TINY.num_layers
    hidden_size: int = MIXTRAL_TINY.hidden_size
    num_attention_heads: int = MIXTRAL_TINY.num_attention_heads
    num_query_groups: int | None = MIXTRAL_TINY.num_query_groups
    kv_channels: int | None = MIXTRAL_TINY.kv_channels
    ffn_hidden_size: int | None = MIXTRAL_TINY.ffn_hidden_size
    vocab_size: int = MIXTRAL_TINY.vocab_size
    seq_length: int = 256
    max_position_embeddings: int = MIXTRAL_TINY.max_position_embeddings
    rotary_base: float = 1e4
    init_method_std: float = 0.06  # 0.02 suits hidden sizes of thousands
    bf16: bool = False
    params_dtype: torch.dtype = torch.float32


@takes_nemos_arguments
@dataclass
class MixtralModel:
    """A model to build: its configuration, and the tokenizer it is used with.

    Attributes:
        config: The Mixtral configuration.
        optim: Optimizer and schedule, for a recipe that names none.
        tokenizer: A folder or Hub id to load the tokenizer from, an `AutoTokenizer`, or a tokenizer; None takes the
            checkpoint's own, or with random weights the configuration's ``default_tokenizer``.
        model_transform: Adapters to train, for a recipe that names none in ``peft``.
    """

    config: MixtralConfig = field(default_factory=MixtralConfig8x7B)  # pyright: ignore[reportCallIssue, reportArgumentType]
    optim: MegatronOptimizerModule | None = None
    tokenizer: Any = None
    model_transform: LoRA | None = None


def with_topology(config: MixtralConfig, topology: Topology, **overrides: Any) -> MixtralConfig:
    """A copy of a configuration with every parallel size filled in, checked again by Megatron.

    Args:
        config: The recipe's configuration.
        topology: Where the parallel sizes come from.
        **overrides: Further fields (precision, overlap).
    """
    return config.changed(
        **topology.megatron_sizes(),
        sequence_parallel=topology.sequence_parallel,
        # Megatron fills this in from the pipeline size, which is 1 in a recipe's own configuration.
        microbatch_group_size_per_vp_stage=max(
            config.microbatch_group_size_per_vp_stage or 1, topology.pipeline_model_parallel_size
        ),
        **overrides,
    )
