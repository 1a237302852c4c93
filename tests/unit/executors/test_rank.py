"""How a rank of a job ends."""

import os
import signal
from collections.abc import Iterator

import pytest

from mixtral_recipes.errors import Preempted, RecipeError
from mixtral_recipes.executors import rank


@pytest.fixture(autouse=True)
def _as_in_a_rank() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, rank._stopped_early)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_request_to_stop_before_training_ends_the_rank() -> None:
    with pytest.raises(Preempted, match="before training began"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_error_of_a_rank_outlives_the_signal_that_follows_it() -> None:
    """Another rank failed of the same: torchrun asks this one to stop while it writes its report."""
    with pytest.raises(RecipeError, match="the loss is nan"):
        _fails_and_is_asked_to_stop()


def _fails_and_is_asked_to_stop() -> None:
    try:
        raise RecipeError("the loss is nan")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
