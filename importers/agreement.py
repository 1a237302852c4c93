"""Combines a recipe's model with the checkpoint it starts from: what is taken from which, and what is refused.

A value that the recipe sets is used, or refused by its name; otherwise the checkpoint's value is used. The result
comes with the config.json that describes it, which every checkpoint and export of the run carries.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.importers.hf.config import SAME_NUMBER, rope_theta, to_megatron, value

if TYPE_CHECKING:
    from mixtral_recipes.models.config import MixtralConfig

# What fixes the weights' shapes: the recipe's layout is chosen for it.
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
)
# What a recipe may change in a checkpoint's model.
_CHANGEABLE = (
    "max_position_embeddings",
    "rotary_base",
    "layernorm_epsilon",
    "moe_router_topk",
    "init_method_std",
    "attention_dropout",
)
# How a run trains: the recipe's value holds, given or not.
_TRAINING = ("moe_aux_loss_coeff",)


@dataclass(frozen=True)
class Vocabulary:
    """What a run's tokenizer needs of the model.

    Attributes:
        name: The tokenizer's, for messages.
        size: Its largest id plus one.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Agreed:
    """The model that is trained.

    Attributes:
        config: Its configuration.
        published: config.json that describes it.
        rows: Tokens the checkpoint has rows for; the rest of ``config.vocab_size`` is new.
    """

    config: "MixtralConfig"
    published: dict[str, Any]
    rows: int

    @property
    def new_rows(self) -> range:
        """The tokens that have no row in the checkpoint."""
        return range(self.rows, self.config.vocab_size)


def agree(
    config: "MixtralConfig",
    published: dict[str, Any],
    base: Path,
    *,
    vocabulary: Vocabulary | None = None,
    resize_vocab: bool = False,
) -> Agreed:
    """Combine a recipe's configuration with a checkpoint's.

    Args:
        config: The recipe's.
        published: The checkpoint's config.json.
        base: The checkpoint, for errors.
        vocabulary: The tokenizer's; None where there is none, or it cannot be seen yet.
        resize_vocab: Whether the vocabulary may grow.

    Raises:
        RecipeError: names the field in which the models differ, or the vocabulary that does not fit.
    """
    stored = to_megatron(published)
    _refuse_another_shape(config, stored, base, "--restore-from")
    taken = {name: stored[name] for name in _CHANGEABLE if not config.is_given(name)}
    rows = stored["vocab_size"]
    wanted = config.vocab_size if config.is_given("vocab_size") else None
    size = _vocab_size(wanted, rows, base, vocabulary, resize_vocab=resize_vocab)
    agreed = config.changed(**taken, vocab_size=size)
    written = [*_CHANGEABLE, *(name for name in _TRAINING if config.is_given(name)), "vocab_size"]
    return Agreed(agreed, _described(published, agreed, written), rows)


def refuse_another(config: "MixtralConfig", published: dict[str, Any], base: Path) -> None:
    """Refuse a checkpoint that is not the model a configuration describes.

    Args:
        config: The configuration.
        published: The checkpoint's, in Hugging Face's words.
        base: The checkpoint.

    Raises:
        RecipeError: names the first field that was given, or fixes a shape, and differs.
    """
    stored = to_megatron(published)
    _refuse_another_shape(config, stored, base, "source")
    for name in (*_CHANGEABLE, "vocab_size"):
        if config.is_given(name) and getattr(config, name) != stored[name]:
            raise RecipeError(f"model.config.{name}={getattr(config, name)}, but {base} has {stored[name]}.")


def check_vocabulary(config: "MixtralConfig", vocabulary: Vocabulary | None) -> None:
    """Refuse a tokenizer with tokens that a model of random weights has no row for.

    Raises:
        RecipeError: says how large the vocabulary must be.
    """
    if vocabulary is not None and vocabulary.size > config.vocab_size:
        raise RecipeError(
            f"the tokenizer {vocabulary.name} has {vocabulary.size} tokens, but "
            f"model.config.vocab_size={config.vocab_size}; set model.config.vocab_size={vocabulary.size} or more."
        )


def refuse_untrained_rows(agreed: Agreed, peft: Any, restore: Any) -> None:
    """Refuse to add vocabulary rows that the run would not train.

    Args:
        agreed: The model that is trained.
        peft: The adapter scheme; None trains all weights.
        restore: ``resume.restore_config``.

    Raises:
        RecipeError: says what to change.
    """
    if not agreed.new_rows:
        return
    if peft is not None:
        raise RecipeError(
            f"--resize-vocab adds {len(agreed.new_rows)} tokens, whose rows must be learned, but adapters leave the "
            "embeddings unchanged: train all weights (--peft none)."
        )
    if restore.load_optim_state:
        raise RecipeError(
            "resume.restore_config.load_optim_state=True, but there is no optimizer state for the rows that "
            "--resize-vocab adds; set it to False."
        )


def _refuse_another_shape(config: "MixtralConfig", stored: dict[str, Any], base: Path, named_by: str) -> None:
    stored = stored | {"moe_ffn_hidden_size": stored["ffn_hidden_size"]}
    for name in _SHAPE:
        if getattr(config, name) != stored[name]:
            raise RecipeError(
                f"model.config.{name}={getattr(config, name)}, but the checkpoint {base} has {stored[name]}; "
                f"choose the recipe of that model, or another {named_by}."
            )


def _vocab_size(wanted: int | None, rows: int, base: Path, vocabulary: Vocabulary | None, *, resize_vocab: bool) -> int:
    """Tokens of the model that is trained.

    Args:
        wanted: ``model.config.vocab_size``, where it is given.
        rows: Tokens of the checkpoint.
        base: The checkpoint.
        vocabulary: The tokenizer's.
        resize_vocab: Whether rows may be added.
    """
    needed = vocabulary.size if vocabulary else 0
    size = wanted if wanted is not None else max(rows, needed) if resize_vocab else rows
    if size < rows:
        raise RecipeError(
            f"model.config.vocab_size={size}, but the checkpoint {base} has {rows} tokens, and import never drops "
            "tokens; leave it out."
        )
    if vocabulary and needed > size:
        fix = "choose one that fits (model.tokenizer), or pass --resize-vocab to add rows for the new tokens"
        if wanted is not None:
            fix = f"set model.config.vocab_size={needed} or more, and pass --resize-vocab"
        raise RecipeError(
            f"the tokenizer {vocabulary.name} has {needed} tokens, but the model (checkpoint {base}) only {size}: "
            f"tokens from {size} on have no row in its embeddings; {fix}."
        )
    if size > rows and not resize_vocab:
        raise RecipeError(
            f"model.config.vocab_size={size}, but the checkpoint {base} has {rows} tokens; pass --resize-vocab to "
            "start new rows from the mean of the existing ones, or leave it out."
        )
    return size


def _described(published: dict[str, Any], config: "MixtralConfig", fields: list[str]) -> dict[str, Any]:
    """config.json with the values of a configuration, each in every place where it stands."""
    found = copy.deepcopy(published)
    for name in fields:
        field = SAME_NUMBER.get(name)
        if field is not None and value(found, field) != getattr(config, name):
            found[field] = getattr(config, name)
    if rope_theta(found) != config.rotary_base:
        ropes = [found[name] for name in ("rope_parameters", "rope_scaling") if found.get(name)]
        for rope in ropes:
            rope["rope_theta"] = config.rotary_base
        if "rope_theta" in found or not ropes:
            found["rope_theta"] = config.rotary_base
    return found
