"""The model that a run trains, told from its settings and from the small files of what it starts from.

The same question is asked twice: before anything starts, a dry run included (`seen_model`), and by every rank.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.tokenizer_choice import chosen_tokenizer, described, size_on_disk
from mixtral_recipes.data.tokenizers import vocabulary_size
from mixtral_recipes.errors import MixtralRecipesError, RecipeError, in_short
from mixtral_recipes.importers.agreement import Agreed, Vocabulary, agree, check_vocabulary, refuse_untrained_rows
from mixtral_recipes.importers.hf.config import from_megatron
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.peek import peek
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.acceleration import refuse_without
from mixtral_recipes.models.config import MixtralConfig, MixtralModel, with_topology
from mixtral_recipes.peft.busiest import with_experts_named
from mixtral_recipes.settings.nemo.mixtrals import BALANCING, balances_as_mixtral
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training import precision, user_buffers
from mixtral_recipes.training.watch import callbacks


def agreed_model(
    config: MixtralConfig,
    trainer: Trainer,
    resume: AutoResume,
    peft: LoRA | None,
    base: Path | None,
    vocabulary: Vocabulary | None,
) -> Agreed:
    """The recipe's model, put together with the one it starts from.

    Args:
        config: The recipe's configuration.
        trainer: The recipe's; its precision is the dtype of random weights.
        resume: Where the run starts.
        peft: Adapters to train.
        base: The folder with the config.json of what it starts from; None means random weights.
        vocabulary: The tokenizer's; None where there is none, or it cannot be seen yet.

    Raises:
        RecipeError: they are different models, or the tokenizer does not fit.
    """
    restore = resume.restore_config
    if base is None or restore is None:
        check_vocabulary(config, vocabulary)
        dtype = str(precision.model_fields(trainer.plugins)["params_dtype"]).removeprefix("torch.")
        return Agreed(config, from_megatron(vars(config), dtype=dtype), config.vocab_size)
    place = base.parent if base.name == "context" else base
    agreed = agree(config, read_config(base), place, vocabulary=vocabulary, resize_vocab=restore.resize_vocab)
    refuse_untrained_rows(agreed, peft, restore)
    return agreed


def seen_model(
    model: MixtralModel, trainer: Trainer, resume: AutoResume, peft: LoRA | None, tokenizer: Any, data: Any
) -> MixtralConfig:
    """The configuration of the model that will be trained, before anything is fetched, imported or started.

    Args:
        model: The recipe's.
        trainer: The recipe's.
        resume: Where the run starts.
        peft: Adapters to train.
        tokenizer: The task's argument of that name; None takes the model's or the checkpoint's.
        data: The recipe's data module.

    Returns:
        As far as files on this machine say; the rest is compared when the run starts.

    Raises:
        RecipeError: recipe, checkpoint and tokenizer do not fit together.
    """
    if peft is not None:
        layers, experts = model.config.num_layers, model.config.num_moe_experts or 1
        with_experts_named(peft, layers, experts).check_against(layers, experts)
    source = resume.restore_config.path if resume.restore_config else None
    base = peek(source) if source else None
    if source and base is None:
        return model.config
    named = tokenizer or model.tokenizer or base or model.config.default_tokenizer
    size = size_on_disk(named)
    restore = resume.restore_config
    if size and restore and restore.resize_vocab and isinstance(data, DataModule):
        size = vocabulary_size(data.tokenizer_for(chosen_tokenizer(named), grow=True))
    vocabulary = Vocabulary(described(named), size) if size else None
    return agreed_model(model.config, trainer, resume, peft, base, vocabulary).config


def check_megatron_config(config: MixtralConfig, trainer: Trainer) -> None:
    """Build Megatron's configuration as every rank will, but for what asks for libraries of the ranks' machines.

    These are FP8, and deferring gradients that Transformer Engine adds up.

    Args:
        config: The model's.
        trainer: The recipe's.

    Raises:
        RecipeError: Megatron-Core refuses it, or would only when it routes.
    """
    topk, experts = config.moe_router_topk, config.num_moe_experts or 1
    if topk > experts:
        raise RecipeError(f"model.config.moe_router_topk={topk} exceeds num_moe_experts={experts}.")
    if not balances_as_mixtral(kinds := config.moe_router_load_balancing_type):
        raise RecipeError(
            f"model.config.moe_router_load_balancing_type={kinds!r} is not how Mixtral routes, and no config.json can "
            f"describe such a model; use {', '.join(BALANCING)}."
        )
    if config.cuda_graph_impl != "none" or config.cuda_graph_modules:
        raise RecipeError(
            f"model.config.cuda_graph_impl={config.cuda_graph_impl!r}: CUDA graphs are not supported; leave out "
            "cuda_graph_impl, cuda_graph_modules and their older names."
        )
    topology, device = Topology.of(trainer), _device(trainer)
    _check_attention(config, topology)
    if config.moe_token_dispatcher_type == "flex":
        _check_flex(config, topology)
    if device.type == "cpu":
        refuse_without(config)
    fields = megatron_settings(trainer, topology, device)["model"]
    if fields.get("tp_comm_overlap", config.tp_comm_overlap):
        user_buffers.check(topology)
    with refusals_told():
        here = {name: value for name, value in fields.items() if not name.startswith(("fp8", "defer_embedding"))}
        with_topology(config, topology, **here)


# How Transformer Engine exchanges keys and values; "a2a+p2p" takes several levels of context parallelism.
_EXCHANGES = ("p2p", "all_gather", "a2a")


def _check_attention(config: MixtralConfig, topology: Topology) -> None:
    """Refuse what attention does not do: Megatron's own kernel, and exchanges that Transformer Engine does not have.

    Raises:
        RecipeError: names the setting and its value, and what would work.
    """
    if config.attention_backend is AttnBackend.local:
        raise RecipeError("model.config.attention_backend='local' is not supported; use auto, flash, fused or unfused.")
    kinds = config.cp_comm_type or ()
    for kind in (kinds,) if isinstance(kinds, str) else kinds:
        if kind not in _EXCHANGES:
            raise RecipeError(f"model.config.cp_comm_type={kind!r} is not supported; use {', '.join(_EXCHANGES)}.")
        heads = (config.num_query_groups or config.num_attention_heads) // topology.tensor_model_parallel_size
        if kind == "a2a" and heads % topology.context_parallel_size:
            raise RecipeError(
                f"model.config.cp_comm_type='a2a' divides the heads of keys among the context-parallel ranks, but "
                f"context_parallel_size={topology.context_parallel_size} does not divide num_query_groups / "
                f"tensor_model_parallel_size = {heads}; use p2p or all_gather."
            )


def _check_flex(config: MixtralConfig, topology: Topology) -> None:
    """Refuse a dispatcher between the ranks of the experts where there is one rank.

    Raises:
        RecipeError: names both.
    """
    ranks = topology.tensor_model_parallel_size * topology.expert_model_parallel_size
    if ranks == 1 and config.moe_flex_dispatcher_backend != "hybridep":
        raise RecipeError(
            f"model.config.moe_token_dispatcher_type='flex' with {config.moe_flex_dispatcher_backend} needs several "
            "ranks to share the experts, but there is one; use 'alltoall', or set "
            "trainer.strategy.expert_model_parallel_size."
        )


@contextlib.contextmanager
def refusals_told(configuration: str = "model.config") -> Iterator[None]:
    """Tell what Megatron-Core refuses about a configuration in one line.

    Raises:
        RecipeError: it refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself shows what matters
            yield
    except MixtralRecipesError:
        raise
    except Exception as error:  # Megatron asserts, and raises ValueError and NotImplementedError
        unknown = " is not known" if isinstance(error, KeyError) else ""  # whose text is the key alone
        raise RecipeError(f"Megatron-Core refuses {configuration}: {in_short(error)}{unknown}") from error


def _device(trainer: Trainer) -> torch.device:
    on_gpu = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def megatron_settings(
    trainer: Trainer, topology: Topology, device: torch.device, *, frozen: bool = False
) -> dict[str, dict[str, Any]]:
    """Fields of Megatron's three configs that follow from a run, its callbacks' word included.

    Args:
        trainer: The recipe's.
        topology: Its layout.
        device: Where the run's tensors live.
        frozen: Whether adapters are trained.

    Returns:
        Fields under ``model`` (TransformerConfig), ``ddp`` and ``optimizer``; ``run`` is for callbacks.
    """
    model = precision.model_fields(trainer.plugins) | {
        # The loss is a sum over label tokens, divided once by the global batch's count of them.
        "calculate_per_token_loss": True,
    }
    if topology.pipeline_model_parallel_size == 1:
        model["pipeline_dtype"] = None
    if topology.virtual_pipeline_model_parallel_size:
        # Batched sends need three pipeline ranks: with two, both neighbours are the same rank and messages cross.
        model |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    settings = {
        "model": model,
        "ddp": precision.ddp_fields(trainer.plugins, frozen=frozen),
        "optimizer": {},
        "run": {"topology": topology, "device": device},
    }
    callbacks.call(trainer.callbacks, "configure", settings)
    return settings
