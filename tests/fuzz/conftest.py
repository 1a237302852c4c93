"""One folder of specimens for all tests, in a home folder of its own, without a network."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import specimens
from tests.fuzz.surfaces import Bench


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the specimens."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("home", "temporary"):
        (root / name).mkdir()
    with standing_in(root):
        specimens.make(root)
    return root


@pytest.fixture(scope="module")
def bench(root: Path) -> Iterator[Bench]:
    """The specimens, for the tests of one file: what is set for them is not left to tests elsewhere."""
    with standing_in(root):
        yield Bench(root)


@contextlib.contextmanager
def standing_in(root: Path) -> Iterator[None]:
    """Home, clusters and temporary files in one folder, no network, and nothing logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTRAL_RECIPES_HOME", str(root / "home"))
        patch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(root / "texts" / "clusters.toml"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MPLCONFIGDIR", str(root / "temporary"))
        patch.setenv("COLUMNS", "200")
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(tempfile, "tempdir", str(root / "temporary"))
        patch.chdir(root)
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
