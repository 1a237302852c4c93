"""New tokens' rows start from the mean of the checkpoint's, wherever a rank's share of the vocabulary lies."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mixtral_recipes.checkpoints.checkpointer import Checkpointer
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.load import _fill_new_rows, find_checkpoint
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.settings.resume import AutoResume
from tests.mixtral_folder import mixtral_config, mixtral_tensors, write_model

KEYS = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_checkpoints(key: str, ranks: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = mixtral_tensors(mixtral_config(), torch.bfloat16)
    stored = StoredWeights(import_checkpoint(str(write_model(tmp_path / "hf", mixtral_config(), tensors))) / "weights")
    share = 512 // ranks
    parts = [torch.full((share, 32), 7, dtype=dtype) for _ in range(ranks)]
    shards = [Shard(key, part, (n * share, 0), (share, 32), (512, 32), True) for n, part in enumerate(parts)]
    for shard in shards:
        stored.read_into([shard])
        _fill_new_rows(stored, [shard], range(300, 307))
    whole, own = torch.cat(parts), tensors[KEYS[key]]
    assert torch.equal(whole[:300], own.to(dtype))
    assert torch.equal(whole[300:307], own.float().mean(0).to(dtype).expand(7, -1))
    assert not whole[307:].any(), "padding is no token"


def test_other_weights_are_left_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf", mixtral_config(), mixtral_tensors(mixtral_config(), torch.bfloat16))
    stored = StoredWeights(import_checkpoint(str(folder)) / "weights")
    norm = torch.zeros(32)
    _fill_new_rows(stored, [Shard("decoder.final_layernorm.weight", norm, (0,), (32,), (32,))], range(3, 9))
    assert not norm.any()


def test_an_import_has_no_optimizer_state_to_go_on_with(tmp_path: Path) -> None:
    tensors = mixtral_tensors(mixtral_config(), torch.bfloat16)
    checkpoint = import_checkpoint(str(write_model(tmp_path / "hf", mixtral_config(), tensors)), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out has no optimizer state.*leave out resume\.restore_config\.load"):
        Checkpointer.load_optimizer(cast(Any, None), checkpoint)


def test_an_import_is_no_run_to_resume(tmp_path: Path) -> None:
    tensors = mixtral_tensors(mixtral_config(), torch.bfloat16)
    checkpoint = import_checkpoint(str(write_model(tmp_path / "hf", mixtral_config(), tensors)), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"resume_from_path=.*out: it was not saved by a run.*--restore-from"):
        find_checkpoint(AutoResume(resume_from_path=str(checkpoint)), tmp_path / "run")
