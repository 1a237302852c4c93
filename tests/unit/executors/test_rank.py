"""How a rank of a job ends."""

import json
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


def test_a_rank_goes_on_though_its_worker_is_ended_before_training(tmp_path: Path) -> None:
    program = """
import multiprocessing, sys, time
from mixtral_recipes.executors import rank

def call(_):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.2)
    worker.terminate()
    worker.join()
    time.sleep(1)

rank.call, rank._GRACE_S = call, 0.2
sys.exit(rank.main())
"""
    environment = os.environ | {"MIXTRAL_RECIPES_ATTEMPT_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, "recipe.json"], env=environment, check=True)
    assert json.loads((tmp_path / "rank-0.json").read_text())["error"] == ""


def test_a_rank_that_waits_in_c_for_one_that_has_left_is_ended(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from datetime import timedelta
from torch.distributed import TCPStore
from mixtral_recipes.executors import rank

def call(_):
    store = TCPStore("localhost", 0, 1, is_master=True)
    print("waits", flush=True)
    store.wait(["never"], timedelta(seconds=120))

rank.call, rank._GRACE_S = call, 0.2
sys.exit(rank.main())
"""
    environment = os.environ | {"MIXTRAL_RECIPES_ATTEMPT_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program, "recipe.json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert json.loads((tmp_path / "rank-0.json").read_text())["error"].startswith("asked to stop before training")


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
