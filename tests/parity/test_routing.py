"""However many experts there are and are chosen, an imported Mixtral computes what transformers computes."""

from pathlib import Path

import pytest
import torch

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert import verify_logits
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.verify_logits import compare_logits
from tests.distributed.harness import launch
from tests.mixtral_folder import make_model  # noqa: F401  # a fixture


def compute(kind: str, model: Path, output: Path) -> None:
    torch.distributed.destroy_process_group()
    {"megatron": verify_logits._megatron, "transformers": verify_logits._transformers}[kind](model, output)


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model in a fork that has its libraries, not in a new process (as in test_import_export.py)."""

    def run(kind: str, model: Path, output: Path) -> Path:
        launch(1, compute, kind, model, output)
        return output

    monkeypatch.setattr(verify_logits, "_run", run)


@pytest.mark.parametrize(("experts", "chosen"), [(8, 1), (1, 1)])
def test_logits_equal_transformers(experts: int, chosen: int, make_model, tmp_path: Path) -> None:  # noqa: F811
    folder, _, _ = make_model(num_local_experts=experts, num_experts_per_tok=chosen, dtype=torch.float32)
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    detail, _ = compare_logits(checkpoint, folder)
    assert "largest difference" in detail


def test_another_number_of_chosen_experts_is_another_model(make_model, tmp_path: Path) -> None:  # noqa: F811
    folder, _, _ = make_model(num_experts_per_tok=1, dtype=torch.float32)
    other, _, _ = make_model("other", num_experts_per_tok=2, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="rounding explains at most"):
        compare_logits(import_checkpoint(str(folder), tmp_path / "megatron"), other)
