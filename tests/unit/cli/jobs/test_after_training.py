"""Answers before training are those of the model that training started from."""

from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.cli.jobs.after_training import refuse_another_start
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from tests.mixtral_folder import make_model  # noqa: F401  # a fixture


def test_a_start_that_holds_other_weights_by_now(
    make_model: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    folder, _, _ = make_model()
    base = import_checkpoint(str(folder), progress=False)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    parent = Parent("base", record.read(base), str(base))
    record.write(checkpoint, Lineage("adapter", Identity(), parents=(parent,)))
    refuse_another_start(checkpoint, folder)
    make_model(seed=1)
    other = import_checkpoint(str(folder), progress=False)
    with pytest.raises(CheckpointError, match=r"not what .* was trained from any more") as error:
        refuse_another_start(checkpoint, folder)
    for place in (base, other):
        assert (record.read(place).identity.weights or "")[:12] in str(error.value)
