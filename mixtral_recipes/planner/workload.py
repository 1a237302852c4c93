"""What a planner needs to know of a job: sizes, layout, batch, number formats, what is trained, what is recomputed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology, fp8_weights_pay
from mixtral_recipes.settings import adapted

LINEARS = adapted.ALL_LINEAR
# What `model.config.recompute_modules` may name, and a Mixtral has.
_RECOMPUTED = ("core_attn", "layernorm", "moe_act", "moe", "mlp")


@dataclass(frozen=True)
class Adapters:
    """What LoRA, DoRA or QLoRA trains.

    Attributes:
        dim: Rank.
        targets: Adapted layers, by Megatron's names.
        magnitudes: Whether each adapted row has a length of its own (DoRA).
        quantized: Whether the frozen base is kept in 4 or 8 bits (QLoRA).
        ranks: Ranks of single layers, by name.
        bits: Of a quantized base's weight: 4 (NF4) or 8 (int8 by row).
        whole: Modules trained whole beside the adapters, by Megatron's names.
        layers: The layers that are adapted, from 0; None is all.
        experts: How many of a layer's experts are adapted, all of them on one rank if they can be; None is all.
    """

    dim: int = 32
    targets: tuple[str, ...] = LINEARS
    magnitudes: bool = False
    quantized: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    bits: int = 4
    whole: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    experts: int | None = None

    @property
    def can_be_quantized(self) -> bool:
        """Whether these may as well be trained over a quantized base."""
        return not (self.quantized or self.magnitudes)

    def rank_of(self, layer: str) -> int:
        """The rank of one layer's adapter."""
        return dict(self.ranks).get(layer, self.dim)

    def share_of(self, layer: str, shape: ModelShape) -> float:
        """Of a kind of layer's work in the whole model, the part that is adapted."""
        share = 1.0 if self.layers is None else len(self.layers) / shape.num_layers
        if self.experts is not None and layer in LINEARS[2:]:
            share *= self.experts / shape.num_moe_experts
        return share


@dataclass(frozen=True)
class Recompute:
    """Which activations are made again in the backward pass; Megatron's words.

    Attributes:
        granularity: ``""``, ``"full"`` (whole layers) or ``"selective"`` (modules).
        method: Of ``full``: ``"uniform"`` (every layer, in groups) or ``"block"`` (the first layers of each chunk).
        num_layers: Layers in a group (uniform), or recomputed layers of each chunk (block).
        modules: Of ``selective``: core_attn, layernorm, moe_act, moe, mlp.
    """

    granularity: str = ""
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)


@dataclass(frozen=True)
class Workload:
    """One training job, as far as memory and time depend on it.

    Attributes:
        shape: The model.
        topology: The layout.
        batch: Sequences per step and their length.
        adapters: What is trained beside frozen weights; None trains all weights.
        recompute: What is recomputed.
        dtype_bytes: Bytes of a weight and of an activation: 2 (bf16, fp16) or 4 (fp32).
        fp8_recipe: Scaling recipe of FP8 products; empty without FP8.
        fp8_param_gather: Whether weights are kept and gathered in FP8; None where that pays (`fp8_weights_pay`).
        grad_bytes: Bytes of a gradient in the buffer: 4, or 2 where it is reduced in 16 bits.
        state_bytes: Bytes of a trained 16-bit weight's optimizer state: its fp32 value, or what bf16 leaves of it, and
            two moments.
        distributed_optimizer: Whether the copies of a parameter share its optimizer state.
        sharded_weights: Whether they share weights and gradients too (fully sharded data parallelism).
        overlap_grad_reduce: Whether gradients are reduced while others are computed (and lie in buckets).
        capacity_factor: Tokens an expert takes over an even share, padded; None drops no token.
        topk: Experts per token.
        fused_attention: Whether attention stores no scores (flash, cuDNN or torch's fused kernels).
        transformer_engine: Whether layers are Transformer Engine's; else ours in plain PyTorch.
        wgrad_fusion: Whether a product adds a weight's gradient to its buffer by itself
            (``model.config.gradient_accumulation_fusion``, else ``accelerate``).
        fused: Whether permutation, rotation, gate and loss are fused kernels (likewise).
        frees_outputs: Whether a stage's outputs are freed once sent (``model.config.deallocate_pipeline_outputs``).
        lengths: Mean tokens of a sample in a packed or padded sequence; None for full sequences.
        pretrains: Whether it is pretraining, where adapters are not an option.
    """

    shape: ModelShape
    topology: Topology
    batch: BatchShape
    adapters: Adapters | None = None
    recompute: Recompute = Recompute()
    dtype_bytes: int = 2
    fp8_recipe: str = ""
    fp8_param_gather: bool | None = None
    grad_bytes: int = 4
    state_bytes: int = 12
    distributed_optimizer: bool = True
    sharded_weights: bool = False
    overlap_grad_reduce: bool = True
    capacity_factor: float | None = None
    topk: int = 2
    fused_attention: bool = True
    transformer_engine: bool = True
    wgrad_fusion: bool = True
    fused: bool = True
    frees_outputs: bool = False
    lengths: float | None = None
    pretrains: bool = False

    @property
    def mean_length(self) -> float:
        """Tokens a token may attend to at most: of a sample in a pack, else of the sequence."""
        return min(self.lengths or self.batch.seq_length, self.batch.seq_length)

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained."""
        return self.adapters is None

    @property
    def fp8_weights(self) -> bool:
        """Whether linear layers keep their weights in FP8."""
        if not self.fp8_recipe:
            return False
        asked = self.fp8_param_gather
        return fp8_weights_pay(self.topology, frozen=not self.trains_all) if asked is None else asked

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.batch.global_batch_size * self.batch.seq_length

    def on_cpu(self) -> "Workload":
        """The same job on a CPU: our plain layers, nothing fused."""
        return dataclasses.replace(self, transformer_engine=False, wgrad_fusion=False, fused=False)

    def on(self, topology: Topology, **changes: Any) -> "Workload":
        """The same job in another layout, with other changes."""
        return dataclasses.replace(self, topology=topology, **changes)

    @staticmethod
    def of(recipe: Any) -> "Workload":
        """The job a recipe describes: a `run.Partial`, its parts built, or an outline of it (`recipes/outline.py`).

        Layers are taken to be Transformer Engine's where the recipe runs on GPUs, with all of `models/acceleration.py`.
        """
        config, trainer = recipe.model.config, recipe.trainer
        plugins, ddp = trainer.plugins, trainer.strategy.ddp
        fp8 = bool(plugins.fp8)
        topology = Topology.of(trainer)
        grad_in_fp32 = plugins.grad_reduce_in_fp32
        if grad_in_fp32 is None:
            grad_in_fp32 = getattr(ddp, "grad_reduce_in_fp32", True)
        dtype_bytes = 4 if str(plugins.precision).startswith("32") else 2
        gpu = trainer.accelerator == "gpu"
        sharding = getattr(ddp, "data_parallel_sharding_strategy", "no_shard") or "no_shard"
        return Workload(
            shape=ModelShape.of(config),
            topology=topology,
            batch=BatchShape.of(recipe.data, fp8=fp8),
            adapters=adapters_of(getattr(recipe, "peft", None), ModelShape.of(config)),
            recompute=_recompute(config),
            dtype_bytes=dtype_bytes,
            fp8_recipe=plugins.fp8_recipe if fp8 else "",
            fp8_param_gather=plugins.fp8_param_gather,
            grad_bytes=4 if grad_in_fp32 and not _in_16_bits(recipe, "main_grads_dtype") else dtype_bytes,
            state_bytes=_state_bytes(recipe),
            distributed_optimizer=bool(_of(recipe, "optim.config.use_distributed_optimizer", True)),
            sharded_weights=sharding != "no_shard",
            overlap_grad_reduce=bool(getattr(ddp, "overlap_grad_reduce", False)),
            capacity_factor=_capacity(config, trainer),
            topk=config.moe_router_topk,
            fused_attention="unfused" not in str(getattr(config, "attention_backend", "")),
            transformer_engine=gpu,
            wgrad_fusion=gpu and _adds_gradients(config),
            frees_outputs=bool(getattr(config, "deallocate_pipeline_outputs", False)),
            fused=gpu and bool(getattr(config, "accelerate", True)),
            pretrains=getattr(getattr(recipe, "__fn_or_cls__", recipe), "__name__", "") == "pretrain",
        )


def _adds_gradients(config: Any) -> bool:
    field = "gradient_accumulation_fusion"
    is_given = getattr(config, "is_given", None)  # of one that is built
    if is_given is not None:
        value = getattr(config, field) if is_given(field) else None
    else:
        value = getattr(config, "__arguments__", vars(config)).get(field)
    return bool(config.accelerate if value is None else value)


def _of(recipe: Any, path: str, default: Any) -> Any:
    value = recipe
    for name in path.split("."):
        value = getattr(value, name, None)
        if value is None:
            return default
    return value


def _in_16_bits(recipe: Any, name: str) -> bool:
    return "16" in str(_of(recipe, f"optim.config.{name}", ""))


def _state_bytes(recipe: Any) -> int:
    """Source: Megatron-Core `optimizer/optimizer_config.py`; in most FP8 recipes it keeps fp32 weights itself."""
    if not _of(recipe, "optim.config.use_precision_aware_optimizer", False):
        return 12
    plugins = recipe.trainer.plugins
    halves = _of(recipe, "optim.config.store_param_remainders", True)
    halves = halves and (not plugins.fp8 or plugins.fp8_recipe == "delayed")
    moments = sum(2 if _in_16_bits(recipe, name) else 4 for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    return (2 if halves else 4) + moments


def _setting(part: Any, name: str, default: Any) -> Any:
    """A setting, or what stands for a default that a `run.Config` makes for each object."""
    try:
        return getattr(part, name)
    except (AttributeError, ValueError):
        return default


def adapters_of(peft: Any, shape: ModelShape) -> Adapters | None:
    """What a scheme trains, whether already built or still a `run.Config` of one; None trains all weights."""
    if peft is None:
        return None
    kind = getattr(peft, "__fn_or_cls__", type(peft))
    names = {one.__name__.lower() for one in getattr(kind, "__mro__", (kind,))}  # one's own is what it derives from
    names |= {str(_setting(peft, "scheme", "")).lower()}
    targets = adapted.modules(_setting(peft, "target_modules", LINEARS), _setting(peft, "exclude_modules", ()))
    ranks = tuple(sorted(_setting(peft, "rank_pattern", {}).items()))
    bits = int(_setting(peft, "bits", 4))
    whole = tuple(_setting(peft, "modules_to_save", ()))
    layers = _setting(peft, "layers", None)
    if layers is not None:
        layers = tuple(n for n in range(shape.num_layers) if adapted.names(layers, n, "peft.layers"))
    experts = _number_of_experts(_setting(peft, "experts", None), shape)
    return Adapters(peft.dim, targets, "dora" in names, "qlora" in names, ranks, bits, whole, layers, experts)


def _number_of_experts(chosen: Any, shape: ModelShape) -> int | None:
    """How many experts of a layer ``peft.experts`` names; of several numbers the largest."""
    if chosen is None:
        return None
    if isinstance(chosen, dict):
        return max(map(len, chosen.values()), default=0)
    busiest = adapted.busiest_of(chosen) if isinstance(chosen, str) else None
    return busiest or sum(adapted.names(chosen, n, "peft.experts") for n in range(shape.num_moe_experts))


def _recompute(config: Any) -> Recompute:
    granularity = config.recompute_granularity or ""
    if granularity == "full":
        method = config.recompute_method or "uniform"
        if method not in ("uniform", "block"):
            raise RecipeError(f"model.config.recompute_method={method!r}; use 'uniform' or 'block'.")
        return Recompute("full", method, config.recompute_num_layers or 1)
    if granularity not in ("", "selective"):
        raise RecipeError(f"model.config.recompute_granularity={granularity!r}; use 'full', 'selective' or null.")
    modules = tuple(config.recompute_modules or ("core_attn",))
    for name in modules:
        if granularity and name not in _RECOMPUTED:
            raise RecipeError(
                f"model.config.recompute_modules: {name!r} is not a known module.{nearest(name, _RECOMPUTED)}"
            )
    return Recompute(granularity, modules=modules)


def _capacity(config: Any, trainer: Any) -> float | None:
    for callback in trainer.callbacks or ():
        factor = getattr(callback, "moe_expert_capacity_factor", None)
        if factor:
            return float(factor)
    return config.moe_expert_capacity_factor
