"""A recipe's model and a checkpoint's: what is given is obeyed or refused, what is not is the checkpoint's."""

import copy
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.importers.agreement import (
    Agreed,
    Vocabulary,
    agree,
    check_vocabulary,
    refuse_another,
    refuse_untrained_rows,
)
from mixtral_recipes.importers.hf.config import to_megatron
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.resume import RestoreConfig
from tests.mixtral_folder import mixtral_config

BASE = Path("/models/base")


def config(**fields: Any) -> MixtralConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
    return MixtralConfig(**sizes | fields)


def agreed(recipe: dict[str, Any] | None = None, published: dict[str, Any] | None = None, **named: Any) -> Agreed:
    return agree(config(**recipe or {}), mixtral_config(**published or {}), BASE, **named)


# Megatron's field, another value than the recipe's default, config.json's field
CHANGEABLE = [
    ("max_position_embeddings", 768, "max_position_embeddings"),
    ("rotary_base", 5e5, "rope_theta"),
    ("layernorm_epsilon", 1e-6, "rms_norm_eps"),
    ("moe_router_topk", 3, "num_experts_per_tok"),
    ("init_method_std", 0.5, "initializer_range"),
    ("attention_dropout", 0.25, "attention_dropout"),
]


@pytest.mark.parametrize(("name", "value", "field"), CHANGEABLE)
def test_a_given_value_is_obeyed_and_published(name: str, value: Any, field: str) -> None:
    found = agreed({name: value})
    assert getattr(found.config, name) == found.published[field] == value
    assert to_megatron(found.published)[name] == value


@pytest.mark.parametrize(("name", "value", "field"), CHANGEABLE)
def test_what_is_not_given_is_the_checkpoints(name: str, value: Any, field: str) -> None:
    published = mixtral_config(**{field: value})
    found = agree(config(), published, BASE)
    assert getattr(found.config, name) == value
    assert found.published == published


@pytest.mark.parametrize(("name", "value", "field"), CHANGEABLE)
def test_the_default_given_in_words_is_obeyed_too(name: str, value: Any, field: str) -> None:
    default = getattr(MixtralConfig, name)
    found = agreed({name: default}, {field: value})
    assert getattr(found.config, name) == found.published[field] == default


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None},
    ],
)
def test_the_rotary_base_changes_in_every_place_where_it_stands(rope: dict[str, Any]) -> None:
    published = {key: value for key, value in mixtral_config(**rope).items() if key != "rope_theta" or value}
    before = copy.deepcopy(published)
    found = agree(config(rotary_base=5e5), published, BASE).published
    places = [found[name]["rope_theta"] for name in ("rope_parameters", "rope_scaling") if name in found]
    assert {*places, found.get("rope_theta", 5e5)} == {5e5}
    assert to_megatron(found)["rotary_base"] == 5e5
    assert published == before, "the checkpoint's own is left alone"


def test_the_load_balancing_loss_is_the_recipes_and_published_where_given() -> None:
    assert agreed().config.moe_aux_loss_coeff == 0.01
    assert agreed().published["router_aux_loss_coef"] == 0.02
    assert agreed({"moe_aux_loss_coeff": 0.0}).published["router_aux_loss_coef"] == 0.0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("num_layers", 3), ("hidden_size", 64), ("ffn_hidden_size", 96), ("moe_ffn_hidden_size", 96),
        ("num_query_groups", 4), ("num_moe_experts", 4),
    ],
)  # fmt: skip
def test_another_shape_is_refused_by_name(name: str, size: int) -> None:
    with pytest.raises(RecipeError, match=rf"^model\.config\.{name}={size}, but the checkpoint {BASE} has"):
        agreed({name: size})


SMALL, LARGE = Vocabulary("own", 300), Vocabulary("other", 302)


@pytest.mark.parametrize(
    ("given", "vocabulary", "resize", "size"),
    [
        (None, None, False, 300),
        (None, SMALL, False, 300),
        (None, Vocabulary("smaller", 10), True, 300),
        (None, LARGE, True, 302),
        (300, SMALL, False, 300),
        (384, SMALL, True, 384),
        (384, LARGE, True, 384),
    ],
)
def test_the_vocabulary(given: int | None, vocabulary: Vocabulary | None, resize: bool, size: int) -> None:
    found = agreed({"vocab_size": given} if given else {}, vocabulary=vocabulary, resize_vocab=resize)
    assert found.config.vocab_size == found.published["vocab_size"] == size
    assert list(found.new_rows) == list(range(300, size))


@pytest.mark.parametrize(
    ("given", "vocabulary", "resize", "told"),
    [
        (
            None,
            LARGE,
            False,
            "other has 302 tokens, but the model .* only 300: tokens from 300 on have no row.* --resize-vocab",
        ),
        (300, LARGE, False, r"302 tokens, but the model .* only 300: .*; set model\.config\.vocab_size=302 or more"),
        (301, LARGE, True, r"302 tokens, but the model .* only 301: .*; set model\.config\.vocab_size=302 or more"),
        (384, SMALL, False, r"vocab_size=384, but the checkpoint /models/base has 300 tokens; pass --resize-vocab"),
        (299, None, True, r"vocab_size=299, but the checkpoint /models/base has 300 tokens, and import never drops"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_in_one_line(
    given: int | None, vocabulary: Vocabulary | None, resize: bool, told: str
) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        agreed({"vocab_size": given} if given else {}, vocabulary=vocabulary, resize_vocab=resize)
    assert "\n" not in str(error.value)


def test_new_rows_that_nothing_would_learn_are_refused() -> None:
    grown = agreed(vocabulary=LARGE, resize_vocab=True)
    refuse_untrained_rows(agreed(vocabulary=SMALL, resize_vocab=True), LoRA(), RestoreConfig(load_optim_state=True))
    refuse_untrained_rows(grown, None, RestoreConfig())
    with pytest.raises(RecipeError, match=r"adds 2 tokens.*--peft none"):
        refuse_untrained_rows(grown, LoRA(), RestoreConfig())
    with pytest.raises(RecipeError, match="load_optim_state=True, but there is no optimizer state for the rows"):
        refuse_untrained_rows(grown, None, RestoreConfig(load_optim_state=True))


def test_a_new_models_vocabulary_must_hold_its_tokenizers() -> None:
    check_vocabulary(config(vocab_size=302), LARGE)
    check_vocabulary(config(vocab_size=302), None)
    with pytest.raises(RecipeError, match=r"302 tokens, but model\.config\.vocab_size=300; set .*=302 or more"):
        check_vocabulary(config(vocab_size=300), LARGE)


def test_an_import_compares_what_was_given_and_nothing_else() -> None:
    refuse_another(config(), mixtral_config(rms_norm_eps=1e-6), BASE)
    with pytest.raises(RecipeError, match=r"model\.config\.layernorm_epsilon=1e-05, but /models/base has 1e-06"):
        refuse_another(config(layernorm_epsilon=1e-5), mixtral_config(rms_norm_eps=1e-6), BASE)
