"""How a rank of a job ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fiddle._src.reraised_exception import try_with_lazy_message

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


@pytest.mark.parametrize(("error", "code"), [("", 0), ("raise Preempted('saved')", 75), ("raise RecipeError('no')", 2)])
def test_a_rank_whose_end_cannot_be_written_ends_as_it_would(error: str, code: int, tmp_path: Path) -> None:
    """As where the job folder's disk is full, and the run's is not."""
    (tmp_path / "file").touch()
    program = (
        "import sys\nfrom mixtral_recipes.errors import Preempted, RecipeError\n"
        f"from mixtral_recipes.executors import rank\ndef call(_):\n    {error or 'pass'}\n"
        "rank.call = call\nsys.exit(rank.main())"
    )
    environment = os.environ | {"MIXTRAL_RECIPES_ATTEMPT_DIR": str(tmp_path / "file" / "0")}
    command = [sys.executable, "-c", program, "recipe.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, {0: "", 75: "saved\n", 2: "no\n"}[code])


def test_where_fiddle_was_is_no_part_of_an_error() -> None:
    with pytest.raises(RecipeError) as raised, try_with_lazy_message(lambda: "\n\nFiddle context: ..."):
        raise RecipeError("no")
    assert rank._end(raised.value)["error"] == "no"
