"""What a Mixtral layer is made of: Transformer Engine's modules where it runs, ours in plain PyTorch elsewhere.

Both give the same checkpoint: on disk the input norm has the name it has inside Transformer Engine's fused layer.
"""

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mixtral_recipes.models.attention import CoreAttention, RMSNorm
from mixtral_recipes.models.cached_attention import SelfAttention
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.models.experts import GroupedExperts
from mixtral_recipes.models.inference_layers import (
    ColumnParallelLinear,
    MoELayer,
    RowParallelLinear,
    TransformerLayer,
)
from mixtral_recipes.models.router import Router
from mixtral_recipes.peft.quantized.layers import Format, linears

_SEPARATE_NORM_ON_DISK = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def block_spec(
    config: MixtralConfig,
    *,
    transformer_engine: bool,
    adapters: bool = False,
    base: Format | None = None,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers one pipeline stage builds.

    Args:
        config: The configuration, parallel sizes filled in.
        transformer_engine: Which kind.
        adapters: Whether adapters will be attached: they need each layer's own input, so no norm may be fused in.
        base: What the frozen weights under adapters are quantised to; None leaves them as they are.
        vp_stage: Which interleaved chunk; None without interleaving.
    """
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    if transformer_engine:
        layer, norm = transformer_engine_layer(config, fused_norm=not adapters, base=base)
    else:
        layer, norm = local_layer(base), RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def local_layer(base: Format | None = None) -> ModuleSpec:
    """A Mixtral layer in plain PyTorch: SDPA attention, RMSNorm, a rank's experts together."""
    return _plain_linears(RMSNorm, CoreAttention, base)


def transformer_engine_layer(
    config: MixtralConfig, *, fused_norm: bool, base: Format | None = None
) -> tuple[ModuleSpec, Any]:
    """A Mixtral layer of Transformer Engine's modules, and its norm.

    Args:
        config: ``moe_grouped_gemm`` decides whether a rank's experts are one grouped product.
        fused_norm: Whether the input norm is part of ``linear_qkv``.
        base: What frozen weights are quantised to: the linear layers are then ours, attention and norms remain.
    """
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    parts = TESpecProvider()
    norm = parts.layer_norm()
    if base is not None:
        return _plain_linears(norm, parts.core_attention(), base), norm
    layer = _layer(
        input_norm=IdentityOp if fused_norm else norm,
        qkv=parts.column_parallel_layer_norm_linear() if fused_norm else parts.column_parallel_linear(),
        attention=parts.core_attention(),
        projection=parts.row_parallel_linear(),
        mlp_norm=norm,
        experts=parts.grouped_mlp_modules(config.moe_grouped_gemm),
        names_on_disk={} if fused_norm else _SEPARATE_NORM_ON_DISK,
    )
    return layer, norm


def _plain_linears(norm: Any, attention: Any, base: Format | None) -> ModuleSpec:
    """A layer whose products are torch's, over weights as they are or quantised ones."""
    column, row = linears(base) if base else (ColumnParallelLinear, RowParallelLinear)
    experts = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    return _layer(
        input_norm=norm,
        qkv=column,
        attention=attention,
        projection=row,
        mlp_norm=norm,
        experts=functools.partial(GroupedExperts, submodules=experts),
        names_on_disk=_SEPARATE_NORM_ON_DISK,
    )


def _layer(
    *,
    input_norm: Any,
    qkv: Any,
    attention: Any,
    projection: Any,
    mlp_norm: Any,
    experts: Any,
    names_on_disk: dict[str, str],
) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv,
                    core_attention=attention,
                    linear_proj=projection,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=mlp_norm,
            mlp=functools.partial(MoELayer, submodules=MoESubmodules(experts=experts, router=Router)),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=names_on_disk,
        ),
    )
