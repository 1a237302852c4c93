"""An imported Mixtral computes what transformers computes, fp32, with and without expert parallelism."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.settings.nemo.mixtrals import BALANCING, balances_as_mixtral
from tests.distributed.harness import launch
from tests.distributed.small_run import relative_error, small_config
from tests.parity.hf_mixtral import Folders, hf_model, make_model, our_logits, our_run, tokens

TOLERANCE = 1e-5  # of the largest logit; fp32, four layers


def transformers_logits(folders: Folders) -> Tensor:
    """What transformers says to `tokens`."""
    with torch.no_grad():
        return hf_model(folders)(tokens()).logits


def megatron_logits(folders: Folders, layout: dict[str, Any]) -> Tensor:
    """What our model says to `tokens`, whole on every rank."""
    return our_logits(our_run(folders, layout), tokens())


@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_equal_transformers(folders: Folders, ranks: int) -> None:
    expected = launch(1, transformers_logits, folders)[0]
    for found in launch(ranks, megatron_logits, folders, {"expert_model_parallel_size": ranks}):
        assert found.shape == expected.shape
        assert relative_error(found, expected) < TOLERANCE


def balanced_logits(folders: Folders, kind: str) -> Tensor:
    """What a model says once trained with its experts' load balanced some way."""
    config = small_config(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.0)
    return our_logits(our_run(folders, config=config), tokens())


@pytest.mark.parametrize("kind", [*BALANCING, "sinkhorn"])
def test_however_load_is_balanced_it_is_a_mixtral_or_refused(folders: Folders, kind: str) -> None:
    expected = launch(1, transformers_logits, folders)[0]
    (found,) = launch(1, balanced_logits, folders, kind)
    assert (relative_error(found, expected) < TOLERANCE) == balances_as_mixtral(kind)


def test_a_changed_weight_is_noticed(folders: Folders, tmp_path: Path) -> None:
    other = launch(1, make_model_with_a_change, str(tmp_path))[0]
    expected = launch(1, transformers_logits, folders)[0]
    found = launch(1, megatron_logits, other, {})[0]
    assert relative_error(found, expected) > 100 * TOLERANCE


def make_model_with_a_change(folder: str) -> Folders:
    """As `make_model`, one expert's weight multiplied by 1.1."""
    folders = make_model(folder)
    model = hf_model(folders)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3] *= 1.1
    model.save_pretrained(folders.hf)
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint

    changed = Path(folder) / "changed"
    import_checkpoint(str(folders.hf), changed, progress=False)
    return Folders(folders.hf, changed)
