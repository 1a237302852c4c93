"""What a recipe says, what changed, and what may not."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.changes import changes, describe, refuse_fixed, refuse_other_settings


def _function() -> None: ...


@dataclass
class _Inner:
    lr: float = 1e-3
    how: Any = _function
    thing: Any = field(default_factory=object)


@dataclass
class _Outer:
    hidden_size: int = 4
    inner: _Inner = field(default_factory=_Inner)
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    callbacks: Any = None


def test_every_setting_by_its_path_in_words_that_stay_the_same() -> None:
    table = describe(model=_Outer(), trainer=_Outer(callbacks=[object()]))
    assert table["model.hidden_size"] == 4
    assert table["model.inner.class"] == "_Inner"
    assert table["model.inner.lr"] == 1e-3
    assert table["model.inner.how"] == f"{__name__}._function"
    assert table["model.inner.thing"] == "object"
    assert table["model.names"] == "a, b"
    assert not any(path.startswith("trainer.callbacks") for path in table)
    assert table == describe(model=_Outer(), trainer=_Outer(callbacks=None))


def test_changes_name_both_values() -> None:
    before, after = describe(optim=_Inner()), describe(optim=_Inner(lr=2e-3))
    assert [str(change) for change in changes(before, after)] == ["optim.lr: 0.001 -> 0.002"]
    assert [str(change) for change in changes({}, {"a": 1})] == ["a: (absent) -> 1"]
    refuse_fixed(changes(before, after))


@pytest.mark.parametrize(
    "path", ["model.config.num_layers", "peft.dim", "peft.class", "base", "optim.config.optimizer"]
)
def test_what_a_checkpoint_depends_on_is_refused_by_name(path: str) -> None:
    with pytest.raises(RecipeError, match=rf"{path}: 1 -> 2"):
        refuse_fixed(changes({path: 1, "other": 1}, {path: 2, "other": 2}))


def test_a_finished_run_is_not_one_with_other_settings() -> None:
    before = {"optim.lr": 1e-3, "peft.class": "LoRA", "peft.dim": 8, "trainer.max_steps": 20}
    elsewhere = {"trainer.devices": 2, "trainer.strategy.expert_model_parallel_size": 2}
    refuse_other_settings("tune", 20, before, before | elsewhere)
    with pytest.raises(RecipeError) as refused:
        refuse_other_settings("tune", 20, before, {"optim.lr": 2e-3, "trainer.max_steps": 10, "peft": None})
    for part in ("optim.lr: 0.001 -> 0.002", "trainer.max_steps: 20 -> 10", "this run trains all weights", "above 20"):
        assert part in str(refused.value)
    assert "peft" not in str(refused.value)
    with pytest.raises(RecipeError, match=r"peft\.dim: 8 -> 16"):
        refuse_other_settings("tune", 20, before, before | {"peft.dim": 16})
    with_files = before | {"the files of a.jsonl": "1"}
    refuse_other_settings("tune", 20, before, with_files)  # nobody looked, the first time
    refuse_other_settings("tune", 20, with_files, before)
    with pytest.raises(RecipeError, match=r"the files of a\.jsonl: 1 -> 2"):
        refuse_other_settings("tune", 20, with_files, before | {"the files of a.jsonl": "2"})
