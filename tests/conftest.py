"""What every test needs: `tests.*` importable under importlib mode, one thread per process, and no GPU by accident."""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Several tests fork processes that share the machine's cores; libraries read this when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's `&` has its commands ignore Ctrl-C, and what they start; tests send that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(scope="module", autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Variables that a file's tests set are unknown to the next file's."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """A run in the tests' own process leaves the CPU's stand-ins in torch; the next file's tests find none."""
    yield
    device = sys.modules.get("mixtral_recipes.cpu.device")
    if device is not None and device.active():
        device.deactivate()


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of other libraries, at import or use, fail no test; ours do, and those our own code is blamed for.

    All tests but those of `tests/gpu` are of the CPU, whose stand-ins are refused where a GPU is usable.
    """
    from mixtral_recipes.system import machine, quiet

    started_by_xdist = hasattr(config, "workerinput")  # and given its variables by the process that has the arguments
    if not started_by_xdist:
        _leave_the_users_home_alone(config)
        if not for_a_gpu(config.args) and machine.gpu_count():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line("filterwarnings", f"ignore:::{quiet.THEIRS}")
    config.addinivalue_line("filterwarnings", f"ignore::SyntaxWarning:{quiet.COMPILED}")


def _leave_the_users_home_alone(config: pytest.Config) -> None:
    """Runs that tests start are recorded, and jobs prepared, in folders of the tests' own."""
    folder = tempfile.mkdtemp(prefix="mixtral-recipes-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for variable in ("MIXTRAL_RECIPES_HOME", "NEMORUN_HOME"):
        os.environ[variable] = os.path.join(folder, variable.lower())


def for_a_gpu(arguments: list[str]) -> bool:
    """Whether only tests of `tests/gpu` are asked for."""
    files = [Path(argument.partition("::")[0]).absolute() for argument in arguments]
    return bool(files) and all(file.is_relative_to(Path(ROOT, "tests", "gpu")) for file in files)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying what it needs."""
    missing = {"gpu": _why_no_gpu, "te": _why_no_transformer_engine}
    for item in items:
        for marker, why in missing.items():
            reason = why() if item.get_closest_marker(marker) else None
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU, and to be asked for: pytest tests/gpu"


def _why_no_transformer_engine() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine (scripts/install_te.sh, then .venv-te/bin/python -m pytest tests/te)"
    return None
