"""The names that checkpoints get."""

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.checkpoint import ModelCheckpoint


@pytest.mark.parametrize("filename", ["{step}-{epoch}", "{}", "{step", "{step.x}", "{val_loss:d}"])
def test_a_name_that_cannot_be_filled_in_says_what_can(filename: str) -> None:
    with pytest.raises(RecipeError, match=r"log.ckpt.filename='.*' cannot be filled in; use {model_name}, {val_loss}"):
        ModelCheckpoint(filename=filename).folder_name("m", 3, 96, 1.234)


def test_a_loss_that_was_not_measured_is_left_out() -> None:
    assert ModelCheckpoint().folder_name("m", 3, 96, 1.234) == "m--1.23-3-96"
    assert ModelCheckpoint().folder_name("m", 3, 96, None) == "m--3-96"
