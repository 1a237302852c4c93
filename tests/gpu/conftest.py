"""What needs a GPU, and how it is rehearsed without one.

All tests of this folder need a GPU. With ``REHEARSE_GPU_TESTS=1`` on a machine that has none they run on the CPU, on
PyTorch's layers, but for those marked ``gpu`` one by one: FP8 and kernels. So a typing error does not wait for a card.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixtral_recipes.cpu import device as cpu_device

REHEARSAL = bool(os.environ.get("REHEARSE_GPU_TESTS"))


def pytest_configure(config: pytest.Config) -> None:
    """On a card no warning is an error, at import neither: drivers and compilers warn of others in each version."""
    if torch.cuda.is_available():
        config.addinivalue_line("filterwarnings", "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not REHEARSAL:
            item.add_marker(pytest.mark.gpu)
    # A card may be there for minutes only: every kind of training comes before the options of one.
    items.sort(key=lambda item: item.path == Path(__file__).with_name("test_options.py"))


@pytest.fixture(scope="session", autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """A rehearsal leaves the CPU's stand-ins in place until the last test."""
    yield
    cpu_device.deactivate()


@pytest.fixture(autouse=True)
def a_card_that_answers() -> Iterator[None]:
    """Ends a process that has lost the card, after a kernel's fault: there all other tests would fail, too."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:  # xdist starts another process for the tests that are left
            os._exit(1)
        pytest.exit(f"the card answers this process no more: {error}", returncode=1)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """Where tensors are."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that has read a little: what fine-tuning starts from."""
    from tests.gpu.small_runs import train  # Megatron warns when it is imported, which is kept quiet in tests only

    return train(tmp_path_factory.mktemp("base"), steps=10, batch=8, save=True).checkpoint
