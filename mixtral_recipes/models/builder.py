"""From a MixtralConfig to Megatron modules: the one file that knows GPTModel.

megatron-core announces GPTModel as deprecated; only this file names it, and the dependency is pinned below 0.20.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.models import kernel_choice
from mixtral_recipes.models.compiled import compile_for_memory
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.models.kernels import transformer_engine_usable
from mixtral_recipes.models.layer_specs import block_spec
from mixtral_recipes.models.weight_gradients import add_in_products, prepare_none_of_frozen_experts
from mixtral_recipes.peft.quantized.layers import Format


def build_model(
    config: MixtralConfig,
    *,
    adapters: bool = False,
    base: Format | None = None,
    transformer_engine: bool | None = None,
) -> list[GPTModel]:
    """Build this rank's part of the model.

    Megatron's parallel state must be initialised, and the configuration carry its parallel sizes (`with_topology`).

    Args:
        config: The configuration.
        adapters: Whether adapters will be attached (`layer_specs.block_spec`).
        base: What the frozen weights under them are quantised to; None leaves them as they are.
        transformer_engine: Which layer spec; None decides by what this machine can run.

    Returns:
        One GPTModel per virtual pipeline chunk (one in all without interleaving), parameters in
        ``config.params_dtype`` on the current device.

    Raises:
        EnvironmentProblem: the package of the flex dispatcher's backend is not installed, or the user's environment
            variables contradict the configuration.
    """
    if config.moe_token_dispatcher_type == "flex":
        _need_backend(config.moe_flex_dispatcher_backend)
    if transformer_engine is None:
        transformer_engine = transformer_engine_usable()
    if transformer_engine:
        add_in_products()
        prepare_none_of_frozen_experts()
        kernel_choice.apply(config)
    if config.bias_activation_fusion and torch.cuda.is_available():
        compile_for_memory()
    interleaved = config.virtual_pipeline_model_parallel_size
    chunks: list[GPTModel] = [
        _build_chunk(
            config,
            transformer_engine=transformer_engine,
            adapters=adapters,
            base=base,
            vp_stage=stage if interleaved else None,
        )
        for stage in range(interleaved or 1)
    ]
    if config.use_cpu_initialization and torch.cuda.is_available():
        for chunk in chunks:
            chunk.cuda()
    if config.freeze_router:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if ".mlp.router." in name:
                    parameter.requires_grad_(False)
    return chunks


def _need_backend(name: str) -> None:
    """Refuse a flex dispatcher without what it sends tokens with, before Megatron says so in a traceback."""
    package, there = {
        "deepep": ("deep_ep (DeepEP)", fused_a2a.HAVE_DEEP_EP),
        "hybridep": ("deep_ep (its hybrid-ep branch)", fused_a2a.HAVE_HYBRIDEP),
        "ncclep": ("a Transformer Engine built with NCCL EP", fused_a2a.HAVE_TE_EP),
    }[name]
    if not there:
        raise EnvironmentProblem(
            f"model.config.moe_flex_dispatcher_backend={name!r} needs {package}, which is not installed; install it in "
            "every rank's Python environment, or use model.config.moe_token_dispatcher_type=alltoall."
        )


class MixtralGPT(GPTModel):
    """Megatron's GPTModel with gaps closed: padded vocabulary rows, and padding masks on later pipeline stages.

    Megatron rounds the vocabulary up and lets the rows that belong to no token take part in the softmax; here they
    have probability zero, so losses do not depend on the layout and equal transformers'.
    """

    def __init__(self, config: MixtralConfig, **settings: Any) -> None:
        super().__init__(config=config, **settings)
        if self.post_process:
            rows = self.output_layer.weight.shape[0]  # pyright: ignore[reportOptionalMemberAccess]
            first = parallel_state.get_tensor_model_parallel_rank() * rows
            self._real_rows = min(max(config.vocab_size - first, 0), rows)
            if self._real_rows < rows:
                self.output_layer.register_forward_hook(self._mask_padding_rows)

    def _set_attention_backend(self) -> None:
        """Nothing: `kernel_choice` did it before anybody asked which kernel will run.

        Megatron's own keeps its choice for every later model of the process, and asserts that the user's variables say
        the same, without a GPU too.
        """

    def _mask_padding_rows(self, layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        # Their gradient is then zero by itself, so autograd need not know; logits are [s, b, rows].
        logits = output[0].detach()
        rows = logits[..., self._real_rows : layer.weight.shape[0]]
        rows.fill_(torch.finfo(logits.dtype).min)

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **named: Any) -> Any:
        """As GPTModel's; a padding mask [b, s] is cut to this rank's share of the sequence on every stage."""
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            ranks, rank = self.pg_collection.tp.size(), self.pg_collection.tp.rank()
            padding_mask = padding_mask.chunk(ranks, dim=1)[rank]
        return super().forward(*args, padding_mask=padding_mask, **named)


def _build_chunk(
    config: MixtralConfig, *, transformer_engine: bool, adapters: bool, base: Format | None, vp_stage: int | None
) -> MixtralGPT:
    spec = block_spec(config, transformer_engine=transformer_engine, adapters=adapters, base=base, vp_stage=vp_stage)
    return MixtralGPT(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=ModelShape.of(config).padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,  # pyright: ignore[reportArgumentType]
        vp_stage=vp_stage,
    )
