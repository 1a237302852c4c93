"""One folder of specimens for all tests, in a home folder of its own, without a network."""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.fuzz import specimens
from tests.fuzz.surfaces import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The specimens."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("home", "temporary"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTRAL_RECIPES_HOME", str(root / "home"))
        patch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(root / "texts" / "clusters.toml"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MPLCONFIGDIR", str(root / "temporary"))
        patch.setenv("COLUMNS", "200")
        patch.setattr(tempfile, "tempdir", str(root / "temporary"))
        patch.chdir(root)
        os.environ.pop("HF_TOKEN", None)
        logging.disable(logging.CRITICAL)
        specimens.make(root)
        yield Bench(root)
        logging.disable(logging.NOTSET)
