"""Which fields of a configuration were given, and what Megatron refuses and a Mixtral may have."""

import copy
import pickle

import fiddle as fdl
import nemo_run as run
import pytest

from mixtral_recipes.models.config import MixtralConfig8x7B, MixtralConfigTiny


def test_what_is_given_is_known_however_a_configuration_was_made() -> None:
    recipe = run.Config(MixtralConfigTiny, rotary_base=1e4)
    recipe.vocab_size = 1999  # as an override sets it, to the default
    for made in (fdl.build(recipe), MixtralConfigTiny(rotary_base=1e4, vocab_size=1999)):
        for same in (made, copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
            names = ("rotary_base", "vocab_size", "layernorm_epsilon", "max_position_embeddings")
            assert [same.is_given(name) for name in names] == [True, True, False, False]


def test_what_is_set_afterwards_or_by_position_is_given() -> None:
    made = MixtralConfigTiny()
    made.layernorm_epsilon = 1e-6
    assert made.is_given("layernorm_epsilon")
    assert MixtralConfigTiny(1).is_given("tensor_model_parallel_size")
    assert not MixtralConfig8x7B().is_given("num_layers")


def test_a_changed_copy_knows_what_was_given_and_what_is_changed() -> None:
    made = MixtralConfigTiny(rotary_base=1e4).changed(apply_rope_fusion=False)
    given = ("rotary_base", "apply_rope_fusion", "cross_entropy_loss_fusion", "layernorm_epsilon")
    assert [made.is_given(name) for name in given] == [True, True, False, False]


def test_one_expert_per_token_is_a_mixtral_and_stays_without_pre_softmax() -> None:
    assert MixtralConfigTiny(moe_router_topk=1).moe_router_pre_softmax is False
    assert MixtralConfigTiny(moe_router_topk=1, moe_router_pre_softmax=True).moe_router_pre_softmax is True
    with pytest.raises(ValueError, match="moe_router_group_topk"):  # Megatron's other checks go on
        MixtralConfigTiny(moe_router_topk=1, moe_router_group_topk=1, moe_router_topk_limited_devices=1)
